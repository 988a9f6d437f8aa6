// A finger that scrolls the page must not zoom a plot.
if (matchMedia("(pointer: coarse)").matches)
  document.querySelectorAll(".plotly-graph-div").forEach(plot => Plotly.relayout(plot,
    {dragmode: false, "xaxis.fixedrange": true, "yaxis.fixedrange": true}));
