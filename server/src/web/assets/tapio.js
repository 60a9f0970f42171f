// What a page can do more with JavaScript: it follows what is found, copies commands, and has keys. Without it, all is there to read.
"use strict";

// The page loads its own address again and takes over the parts that are marked: the server alone says how they look.
const following = document.body.dataset.follows;
const word = document.getElementById("live");
const SETTLE_MS = 300;
// Between two loads. Pages that read the archive are loaded more seldom.
const PACE_MS = location.pathname === "/" ? 2000 : 10000;
const MINUTE_MS = 60000;
let waiting = 0;
let asked = 0;
let loaded = -PACE_MS;

async function refresh() {
  waiting = 0;
  loaded = performance.now();
  const turn = ++asked;
  let answer;
  try {
    answer = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" });
  } catch {
    return;
  }
  if (answer.status === 401) location.reload();
  if (answer.status === 404) say("this does not stand any more");
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (turn !== asked) return;
  const known = new Set(Array.from(document.querySelectorAll("[data-id]"), (item) => item.dataset.id));
  let added = 0;
  for (const part of document.querySelectorAll("[data-fresh]")) {
    const now = fresh.getElementById(part.id);
    if (!now) continue;
    for (const item of now.querySelectorAll("[data-id]")) {
      if (!known.has(item.dataset.id)) {
        item.classList.add("new");
        added += 1;
      }
    }
    take(part, now);
  }
  if (added > 0) say(added === 1 ? "1 new finding" : `${added} new findings`);
  dress();
}

// What was open stays open, and what had the focus has it.
function take(part, now) {
  const open = Array.from(part.querySelectorAll("details"), (details) => details.open);
  const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  now.querySelectorAll("details").forEach((details, index) => { if (open[index]) details.open = true; });
  part.replaceChildren(...Array.from(now.childNodes, (node) => document.importNode(node, true)));
  if (focused) {
    const again = Array.from(part.querySelectorAll("a[href]")).find((link) => link.getAttribute("href") === focused);
    if (again) again.focus({ preventScroll: true });
  }
}

function say(text) {
  if (word) word.textContent = text;
}

function soon() {
  const rest = PACE_MS - (performance.now() - loaded);
  if (!waiting) waiting = setTimeout(refresh, Math.max(SETTLE_MS, rest));
}

let source = null;
let wasCut = false;

function follow() {
  if (source) return;
  source = new EventSource("/live");
  source.addEventListener("finding", (event) => {
    if (following === "all" || JSON.parse(event.data).id === following) soon();
  });
  source.addEventListener("open", () => {
    say("live");
    // What was found meanwhile is not sent again.
    if (wasCut) soon();
    wasCut = false;
  });
  source.addEventListener("error", () => {
    say("not live: the server is away");
    wasCut = true;
  });
}

// A browser has six connections to a server: a page that nobody sees keeps none.
function leave() {
  if (source) source.close();
  source = null;
  wasCut = true;
}

if (following) {
  const look = () => { if (document.hidden) leave(); else follow(); };
  look();
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", leave);
  addEventListener("pageshow", look);
  // Times ago go on, and so does what is not known.
  setInterval(() => { if (!document.hidden) soon(); }, MINUTE_MS);
}

async function copy(text) {
  // Only where the address is this machine's own, or over HTTPS.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not copied");
}

function dress() {
  // Where a drawing is wider than the screen its end, the death, is seen first.
  for (const drawing of document.querySelectorAll(".drawing")) drawing.scrollLeft = drawing.scrollWidth;
  for (const command of document.querySelectorAll("code[data-copy]")) {
    if (command.nextElementSibling) continue;
    const button = document.createElement("button");
    const call = (text) => {
      button.textContent = text;
      button.setAttribute("aria-label", `${text}: ${command.textContent}`);
    };
    button.type = "button";
    button.className = "copy";
    call("Copy");
    button.addEventListener("click", async () => {
      try {
        await copy(command.textContent);
        call("Copied");
        say("copied");
      } catch {
        call("Select it by hand");
      }
    });
    command.after(button);
  }
}

function step(by) {
  const links = Array.from(document.querySelectorAll("a.title"));
  if (links.length === 0) return;
  const at = links.indexOf(document.activeElement);
  links[Math.min(links.length - 1, Math.max(0, at + by))].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "/") {
    const first = document.querySelector("#filters select, #filters input");
    if (!first) return;
    document.getElementById("filtering").open = true;
    first.focus();
  } else return;
  event.preventDefault();
});

const keys = document.querySelector("footer .keys");
if (keys && document.getElementById("filters")) keys.hidden = false;
dress();
