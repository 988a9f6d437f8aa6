"""The App of the `diptych` command; the other files register their commands on it."""

from importlib.metadata import version

from cyclopts import App, Parameter

from cluster.config_file import read_config_file

app = App(
    name="diptych",
    help="Pre-train image encoders without labels, on any Ray cluster.",
    version=version("diptych"),
    config=read_config_file,
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
