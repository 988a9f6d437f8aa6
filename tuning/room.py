"""What a search's scheduler and its searcher share: which trials run and wait, and what a trial reports."""

# How far a trial is, in evaluations, how good, and whether that was its end; beside what Tune reports itself.
EVALUATIONS, SCORE, FINISHED = "evaluations", "score", "finished"


class Room:
    """At most `size` trials run at a time; `all_begun` once no other will begin."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.running: set[str] = set()
        self.waiting: set[str] = set()
        self.all_begun = False

    @property
    def free(self) -> bool:
        """Whether one more may run."""
        return len(self.running) < self.size

    def run(self, trial_id: str) -> None:
        """A trial begins, or goes on."""
        self.waiting.discard(trial_id)
        self.running.add(trial_id)

    def wait(self, trial_id: str) -> None:
        """A trial waits for others."""
        self.running.discard(trial_id)
        self.waiting.add(trial_id)

    def leave(self, trial_id: str) -> None:
        """A trial is over."""
        self.running.discard(trial_id)
        self.waiting.discard(trial_id)
