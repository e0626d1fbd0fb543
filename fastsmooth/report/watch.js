"use strict";
// Puts a newer page in the place of this one: what is read, open and on the screen stays where it is.
// It stands inside the page, which is XML too: no ampersand, no less-than sign.
(() => {
  const about = (page, name) => page.querySelector(`meta[name="${name}"]`).content;
  const every = 1000 * about(document, "every");
  let version = about(document, "version");

  const text = async address => {
    const answer = await fetch(address, {cache: "no-store"});
    if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
    return answer.text();
  };

  const put = page => {
    version = about(page, "version");
    const height = part => part.getBoundingClientRect().top;
    const begun = part => innerHeight / 2 > height(part);
    const read = scrollY ? [...document.querySelectorAll("section")].filter(begun).pop() : null;
    const [id, above, x, y] = [read?.id, read ? height(read) : 0, scrollX, scrollY];
    const open = [...document.querySelectorAll("details[open]")].map(it => it.closest("section").id);
    document.title = page.title;
    document.body.replaceWith(page.body);
    for (const name of open)
      document.getElementById(name)?.querySelector("details")?.setAttribute("open", "");
    const again = id ? document.getElementById(id) : null;
    scrollTo(x, again ? scrollY + height(again) - above : y);
  };

  const look = async () => {
    let lost = false;
    try {
      if (await text("version") !== version)
        put(new DOMParser().parseFromString(await text("./"), "text/html"));
    } catch {
      lost = true;
    }
    document.getElementById("lost").hidden = !lost;
    setTimeout(look, every);
  };
  setTimeout(look, every);
})();
