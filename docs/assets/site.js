// Wide tables scroll: let the keyboard reach them. The theme wraps them while the page loads.
addEventListener("load", () => {
  for (const wrapper of document.querySelectorAll(".md-typeset__scrollwrap")) wrapper.tabIndex = 0;
});
