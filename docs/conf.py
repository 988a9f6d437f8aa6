"""How Sphinx builds these pages: `make docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "diptych"
version = release = installed_version("diptych")
extensions = ["myst_parser", "docs.fields", "docs.command_list"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"
smartquotes = False  # They would make one dash of the two of a flag.

html_theme = "furo"
html_title = "diptych"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False

# A page that has gone is a broken link; one that wants a log-in or is slow is not.
linkcheck_timeout = 20
linkcheck_retries = 2
