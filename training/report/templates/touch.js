// A finger that scrolls the page must not zoom a plot.
addEventListener("DOMContentLoaded", () => {
  if (!matchMedia("(pointer: coarse)").matches) return;
  document.querySelectorAll(".plotly-graph-div").forEach(plot => Plotly.relayout(plot,
    {dragmode: false, "xaxis.fixedrange": true, "yaxis.fixedrange": true}));
});
