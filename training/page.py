"""One HTML page that needs no network: what the reports of runs and of searches have in common."""

import html
from collections.abc import Iterable

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dbe0; --soft: #5b6270;
  --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181c; --line: #343841; --soft: #9aa1ad; --card: #1d2026; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { margin: 0; line-height: 1.2; } h2 { margin: 3rem 0 .25rem; font-size: 1.35rem; }
h3 { margin: 0; font-size: 1rem; } p { margin: 0 0 .75rem; }
.soft { color: var(--soft); } .note { color: var(--soft); background: var(--card); padding: .75rem 1rem;
  border-left: 3px solid var(--line); border-radius: .25rem; }
h1 + .soft { margin: .25rem 0 1.25rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 46%), 1fr)); gap: .75rem; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem .75rem; }
.facts b { display: block; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
img, svg { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem 1rem; margin: .5rem 0; font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { cursor: pointer; } th::after { content: " \\2195"; color: var(--soft); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - diptych</title><style>{style}</style></head><body>
<h1>{name}</h1><p class="soft">{subtitle}</p>
<div class="facts">{facts}</div>
{body}
<h2>Config</h2><pre>{config}</pre>
</body></html>
"""


def page(
    name: str, subtitle: str, facts: Iterable[tuple[str, str]], body: str, config: str, style: str = ""
) -> str:
    """The page; `facts` are pairs of what it is and its value, `body` is HTML, `config` TOML, `style` CSS."""
    return _PAGE.format(
        name=html.escape(name),
        subtitle=html.escape(subtitle),
        facts="".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
            for label, value in facts
        ),
        body=body,
        config=html.escape(config),
        style=_STYLE + style,
    )
