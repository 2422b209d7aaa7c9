// Live parts of the panel, a plain module for anywidget, see live.py: HTML whose buttons call Python, and a gate for clicks.

const SOON = 700; // ms after which a click that the kernel has not answered is said to wait
const GATED = "button.jupyter-button, .rl-live button[data-ask]";
const WAITING = "The kernel is busy with other cells. Your click waits for them; the kernel's stop button (■) ends them. ";

function element(tag, name, parent, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  parent.append(made);
  return made;
}

async function copy(button) {
  const text = button.closest(".rl-code")?.querySelector("pre")?.textContent ?? "";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", "", document.body, "");
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function save({ name, type, data }) {
  const link = element("a", "", document.body);
  link.href = `data:${type};base64,${data}`;
  link.download = name;
  link.click();
  link.remove();
}

// Holds a click until the kernel answers, since one that overtakes what was typed would work on another fact.
class Gate {
  constructor(model, el) {
    Object.assign(this, { model, el, number: 0, waiting: null });
    this.note = element("div", "rl-waiting", el);
    this.note.setAttribute("role", "status");
    this.note.hidden = true;
    this.click = this.click.bind(this);
    this.key = this.key.bind(this);
    document.addEventListener("click", this.click, true);
    document.addEventListener("keydown", this.key, true);
  }

  get root() {
    return this.el.closest(".rl-edit");
  }

  click(event) {
    const button = event.target.closest?.(GATED);
    if (!button || !event.isTrusted || !this.root?.contains(button)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    this.wait(button);
  }

  // Enter in a field is a click on Trace, in the target on Edit; Shift+Enter is left to the notebook.
  key(event) {
    const field = event.target.closest?.(".rl-fields input, .rl-fields textarea");
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || !field || !this.root?.contains(field)) return;
    if (field.closest(".rl-more, .widget-dropdown")) return;
    event.preventDefault();
    field.dispatchEvent(new Event("change", { bubbles: true })); // so that what was typed goes first
    const button = this.root.querySelector(field.closest(".rl-target") ? ".rl-go-edit" : ".rl-go-trace");
    if (button && !button.disabled) this.wait(button);
  }

  wait(button) {
    const number = (this.number += 1);
    this.waiting = { number, button };
    this.model.send({ ping: number });
    setTimeout(() => this.waiting?.number === number && this.explain(), SOON);
  }

  explain() {
    this.note.textContent = WAITING;
    const button = element("button", "rl-link", this.note, "Withdraw it");
    button.addEventListener("click", () => this.clear());
    this.note.hidden = false;
  }

  clear() {
    this.waiting = null;
    this.note.hidden = true;
  }

  answer(number) {
    if (this.waiting?.number !== number) return;
    const { button } = this.waiting;
    this.clear();
    if (button.isConnected && !button.disabled) button.click(); // not trusted, so it passes
  }

  end() {
    document.removeEventListener("click", this.click, true);
    document.removeEventListener("keydown", this.key, true);
  }
}

function render({ model, el }) {
  el.classList.add("rl-live");
  const body = element("div", "rl-body", el);
  const gate = model.get("gate") ? new Gate(model, el) : null;
  const draw = () => (body.innerHTML = model.get("html")); // every text in it was escaped in Python
  const receive = (message) => {
    if ("pong" in message) gate?.answer(message.pong);
    if (message.file) save(message.file);
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.ask) model.send({ ask: button.dataset.ask, value: button.dataset.value ?? "" });
    if (button?.dataset.copy !== undefined) copy(button);
  });
  draw();
  model.on("change:html", draw);
  model.on("msg:custom", receive);
  return () => {
    gate?.end();
    model.off("change:html", draw);
    model.off("msg:custom", receive);
  };
}

export default { render };
