// Copy buttons of a paper page. Each copies the text of the element it names and says so in the live region.
(function () {
  "use strict";
  const said = document.getElementById("lc-said");
  for (const button of document.querySelectorAll("button[data-copy]")) {
    const source = document.getElementById(button.dataset.copy);
    if (!source || !said) continue;
    button.hidden = false;
    button.addEventListener("click", async function () {
      said.textContent = "";
      const ok = await copy(asFile(source.textContent, button.dataset.format));
      // A region that gets the same text twice is announced once: the empty text in between is a change.
      window.setTimeout(function () {
        said.textContent = ok
          ? button.dataset.format + " copied to the clipboard"
          : "This browser does not let the page copy; select the text above instead";
      }, 30);
    });
  }

  // What HTML does not keep of RIS: the line ends, and the blank after the last tag.
  function asFile(text, format) {
    return format === "RIS" ? text.replace(/^ER  -\s*$/m, "ER  - ").replace(/\r?\n/g, "\r\n") + "\r\n" : text;
  }

  async function copy(text) {
    if (navigator.clipboard && window.isSecureContext) {
      try {
        await navigator.clipboard.writeText(text);
        return true;
      } catch (error) {
        // Permission refused: the older way below may still work.
      }
    }
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("aria-hidden", "true");
    area.style.position = "fixed";
    area.style.opacity = "0";
    document.body.append(area);
    const before = document.activeElement;
    area.select();
    let ok = false;
    try {
      ok = document.execCommand("copy");
    } catch (error) {
      ok = false;
    }
    area.remove();
    if (before instanceof HTMLElement) before.focus();
    return ok;
  }
})();
