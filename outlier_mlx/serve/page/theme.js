// Loaded before the page is drawn, so that it is drawn in the chosen theme at once.
try {
  const chosen = localStorage.getItem("outlier-mlx theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* Without storage, the system's theme is used. */ }
