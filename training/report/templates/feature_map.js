// The pointer enlarges an image; a class of the legend can be shown alone.
document.querySelectorAll(".map").forEach(map => {
  const lens = map.querySelector(".lens");
  const picture = lens.querySelector("img"), label = lens.querySelector("b");
  const show = event => {
    const point = event.target.closest("g");
    lens.style.display = point ? "block" : "none";
    if (!point) return;
    point.parentNode.append(point);
    picture.src = point.querySelector("image").getAttribute("href");
    label.textContent = point.dataset.name;
    const box = map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    lens.style.left = Math.max(0, Math.min(x + 16, box.width - lens.offsetWidth)) + "px";
    lens.style.top = (y > box.height / 2 ? y - lens.offsetHeight - 16 : y + 16) + "px";
  };
  map.addEventListener("pointermove", show);
  map.addEventListener("pointerdown", show);
  map.addEventListener("pointerleave", () => lens.style.display = "none");
  const buttons = [...map.parentNode.querySelectorAll(".legend button")];
  buttons.forEach(button => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    buttons.forEach(each => each.setAttribute("aria-pressed", on && each === button));
    map.classList.toggle("only", on);
    map.querySelectorAll("g").forEach(point =>
      point.classList.toggle("chosen", point.dataset.name === button.textContent));
  }));
});
