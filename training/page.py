"""One HTML page that needs no network: what the reports of runs and of searches have in common."""

import html
from collections.abc import Iterable

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - diptych</title><style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dbe0; --soft: #5b6270; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --paper: #16181c; --line: #343841; --soft: #9aa1ad; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2rem; }} p.soft {{ color: var(--soft); margin-top: 0; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }}
.facts div {{ border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }}
.facts b {{ display: block; font-size: 1.3rem; }} .facts span {{ color: var(--soft); font-size: .85rem; }}
img, svg {{ max-width: 100%; height: auto; }}
pre {{ overflow: auto; border: 1px solid var(--line); padding: .75rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ cursor: pointer; }} th::after {{ content: " \\2195"; color: var(--soft); }}
</style></head><body>
<h1>{name}</h1><p class="soft">{subtitle}</p>
<div class="facts">{facts}</div>
{body}
<h2>Config</h2><pre>{config}</pre>
</body></html>
"""


def page(name: str, subtitle: str, facts: Iterable[tuple[str, str]], body: str, config: str) -> str:
    """The page; `facts` are pairs of what it is and its value, `body` is HTML, `config` TOML."""
    return _PAGE.format(
        name=html.escape(name),
        subtitle=html.escape(subtitle),
        facts="".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in facts),
        body=body,
        config=html.escape(config),
    )
