"""Write the report of a search: one HTML page that needs no network."""

import html
from collections.abc import Sequence

import tomli_w

from pipelines import storage
from training.report.page import page
from training.report.summary import evaluation_facts
from training.run_folder import to_toml
from tuning.config import METRICS, SearchConfig
from tuning.figures import STYLE, drawn, progress, sections
from tuning.trial_config import ranking_line, search_folder
from tuning.trials import Trial

_TABLE = """<h2>Trials</h2><div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>
</table></div>
<script>
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {{
  const body = document.querySelector("tbody"), up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => {{ const cell = row.cells[column].dataset.value, number = Number(cell);
    return cell === "" || Number.isNaN(number) ? cell : number; }};
  [...body.rows].sort((a, b) => {{ const [x, y] = [key(a), key(b)];
    return (x < y ? -1 : x > y ? 1 : 0) * (up === "1" ? 1 : -1); }}).forEach(row => body.append(row));
}}));
</script>
"""


def write_search_report(search: SearchConfig, trials: Sequence[Trial]) -> str:
    """Write OUTPUT/NAME/report.html; returns its URI. `trials` are best first."""
    uri = storage.join(search_folder(search), "report.html")
    storage.write(uri, render(search, trials).encode())
    return uri


def render(search: SearchConfig, trials: Sequence[Trial]) -> str:
    """The page; `trials` are best first."""
    accuracy = {"knn": "kNN", "linear": "linear"}[search.metric]
    subtitle = (
        f"{search.searcher} search with {search.scheduler}, ranked by {accuracy} accuracy on "
        f"{search.held_out:.0%} of {search.train.data.train}"
    )
    space = {key: {what.kind: list(what.values)} for key, what in search.distributions.items()}
    config = tomli_w.dumps({"space": space}) + "\n# Shared by all trials\n" + to_toml(search.train)
    best = ranking_line(search, trials[0].run) if trials else {}
    facts = _facts(trials, best.get(f"{METRICS[search.metric]}_margin")) + evaluation_facts(best)
    body = drawn(sections(search.distributions, trials)) + _table(trials)
    return page(search.name, subtitle, facts, body, config, STYLE)


def saving(trials: Sequence[Trial]) -> float:
    """Share of training images saved by stopping trials early, relative to training all to the end."""
    whole = max((trial.images for trial in trials if trial.state == "finished"), default=0)
    ended = [trial for trial in trials if trial.state in ("finished", "stopped early")]
    saved = sum(max(0, whole - trial.images) for trial in ended if trial.state == "stopped early")
    return saved / (whole * len(ended)) if whole else 0.0


def _facts(trials: Sequence[Trial], margin: float | None) -> list[tuple[str, str]]:
    facts = [("trials", str(len(trials)))]
    failed = sum(trial.state == "failed" for trial in trials)
    if failed:
        facts.append(("trials failed", str(failed)))
    if line := progress(trials):
        seconds, images, best = line[-1]
        facts += [
            ("best accuracy", f"{best:.1%}" + (f" ± {100 * margin:.1f}" if margin else "")),
            ("images trained on", f"{images:,}"),
            ("minutes", f"{seconds / 60:,.1f}"),
        ]
    if saved := saving(trials):
        facts.append(("saved by stopping early", f"{saved:.0%}"))
    return facts


def _table(trials: Sequence[Trial]) -> str:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    heads = ["trial", "accuracy", "score", "images", "multiply-adds", "state", *keys, "run"]
    rows = "".join(f"<tr>{''.join(map(_cell, _row(trial, keys)))}</tr>" for trial in trials)
    return _TABLE.format(heads="".join(f"<th>{html.escape(head)}</th>" for head in heads), rows=rows)


def _row(trial: Trial, keys: Sequence[str]) -> list[object]:
    state = f"failed: {trial.error}" if trial.error else trial.state
    numbers = (trial.accuracy, trial.score, trial.images, trial.multiply_adds, state)
    return [trial.number, *numbers, *(trial.values.get(key) for key in keys), trial.run]


def _cell(value: object) -> str:
    value = "" if value is None else value
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
    return f'<td data-value="{html.escape(str(value))}">{html.escape(str(shown))}</td>'
