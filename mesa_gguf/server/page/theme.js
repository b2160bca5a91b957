// Before the first paint, so that the page does not flash in the other theme.
"use strict";
try {
  const theme = localStorage.getItem("mesa-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is switched off: the system's theme
}
