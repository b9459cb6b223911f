// Runs before the first paint (a classic script in <head>), so that a chosen theme never flashes in late.
// No choice, or a choice equal to the system's, means: follow the system.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = () => {
    try {
      return localStorage.getItem("edgechat.theme");
    } catch {
      return null;
    }
  };
  let chosen = read();
  const apply = () => {
    document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
    document.dispatchEvent(new Event("themechange"));
  };
  dark.addEventListener("change", apply);
  addEventListener("storage", () => {
    chosen = read();
    apply();
  });
  document.addEventListener("toggletheme", () => {
    const wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    chosen = wanted === (dark.matches ? "dark" : "light") ? null : wanted;
    try {
      if (chosen === null) localStorage.removeItem("edgechat.theme");
      else localStorage.setItem("edgechat.theme", chosen);
    } catch {
      // Without storage the choice lasts until the page is left.
    }
    apply();
  });
  apply();
})();
