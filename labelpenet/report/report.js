// An enlarged picture, and what tells that a table is wider than the screen. Without scripts the page is whole but these.
const dialog = document.getElementById("enlarged");
const large = dialog.querySelector("img");
document.querySelectorAll("button.zoom").forEach((button) =>
  button.addEventListener("click", () => {
    const small = button.querySelector("img");
    large.src = small.src;
    large.alt = small.alt;
    dialog.showModal(); // Escape closes it, and the focus returns to the button
  }),
);
dialog.addEventListener("click", () => dialog.close());

function markWide() {
  document.querySelectorAll(".scroll").forEach((one) => {
    const wide = one.scrollWidth > one.clientWidth + 1;
    one.classList.toggle("wide", wide);
    if (wide) one.tabIndex = 0;
    else one.removeAttribute("tabindex");
  });
}
addEventListener("resize", markWide);
document.querySelectorAll("details").forEach((one) => one.addEventListener("toggle", markWide));
markWide();
