// The interactive picture of traces: a plain module for anywidget, see interactive.py, which brings all numbers and colours.

const KINDS = { state: "state", mlp: "MLP outputs", attn: "attention outputs" };
const RUNS = { clean: "Clean run", corrupted: "Corrupted run", restored: "Restored run" };
const NEEDED = { ...RUNS, restored: "Clean run with this corrupted" };
const HINT = "* subject. Point at a cell or move with the arrow keys";
const HINT_OF_RUNS = "; click or Enter shows what its three runs say";
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9] };

function make(tag, name, parent, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

function number(p, signed = false) {
  const size = Math.abs(p);
  const digits = size > 0 && size < 0.001 ? size.toExponential(1) : size.toFixed(4);
  return (p < 0 ? "\u2212" : signed ? "+" : "") + digits;
}

function colour(trace, p) {
  const [low, high] = trace.limits;
  const place = Math.floor(((p - low) / (high - low)) * trace.colours.length);
  return trace.colours[Math.max(0, Math.min(trace.colours.length - 1, place))];
}

function layersOf(trace, layer) {
  const [first, last] = trace.layers[layer];
  return first === last ? `layer ${first}` : `layers ${first}\u2013${last}`;
}

const isSubject = (trace, token) => token >= trace.subject[0] && token < trace.subject[1];

// What the tooltip and a screen reader say of a cell: pairs of a name and a value, and a remark.
function facts(picture, trace, token, layer) {
  const p = trace.p[token][layer];
  const pairs = [[trace.done, `${KINDS[trace.kind]} of ${layersOf(trace, layer)}`]];
  const [restored, effect, clean, corrupted] = trace.names;
  if (p !== null) pairs.push([restored, number(p)], [effect, number(p - trace.base, true)]);
  pairs.push([clean, number(trace.p_clean)], [corrupted, number(trace.p_corrupted)]);
  let remark = "";
  if (p === null) remark = `This token was not ${trace.done}.`;
  else if (token < trace.subject[0]) remark = "Left of the subject both runs are the same, so nothing changes.";
  const name = `token ${token}${isSubject(trace, token) ? " (subject)" : ""}, layer ${layer}`;
  return { word: picture.tokens[token], name, pairs, remark };
}

class Panel {
  constructor(view, trace, index, parent) {
    Object.assign(this, { view, trace, index, cells: [] });
    const { tokens } = view.picture;
    const layers = trace.layers.length;
    this.box = make("section", "rl-panel", parent);
    make("h4", "", this.box, trace.title);
    const scroll = make("div", "rl-scroll", this.box);
    this.grid = make("div", "rl-grid", scroll, "", {
      role: "grid", "aria-label": `${trace.title}: ${trace.metric} by ${trace.done} token and layer`,
      "aria-rowcount": tokens.length, "aria-colcount": layers, "data-lm-suppress-shortcuts": "true",
    });
    this.grid.style.gridTemplateColumns = `minmax(0, max-content) repeat(${layers}, minmax(5px, 1fr))`;
    this.grid.style.gridTemplateRows = `repeat(${tokens.length + 1}, 19px) auto`;
    make("div", "rl-frame", this.grid).style.gridArea = `1 / 2 / ${tokens.length + 1} / -1`;
    tokens.forEach((word, token) => this.addRow(word, token, layers));
    this.addAxis(tokens.length, layers);
    make("div", "rl-label", this.grid, trace.layer_label).style.gridArea = `${tokens.length + 2} / 1 / auto / -1`;
    this.addBar();
    this.marks = Object.fromEntries(["column", "echo", "reach", "run"].map((x) => [x, make("div", `rl-mark rl-${x}`, this.grid)]));
    Object.values(this.marks).forEach((mark) => (mark.hidden = true));
    this.listen();
  }

  addRow(word, token, layers) {
    const row = make("div", "rl-row", this.grid, "", { role: "row" });
    const subject = isSubject(this.trace, token);
    const head = make("div", subject ? "rl-token rl-subject" : "rl-token", row, word, { role: "rowheader", title: word });
    if (subject) head.setAttribute("aria-label", `${word}, subject`);
    head.style.gridArea = `${token + 1} / 1`;
    this.cells.push(Array.from({ length: layers }, (_, layer) => {
      const p = this.trace.p[token][layer];
      const about = facts(this.view.picture, this.trace, token, layer);
      const numbers = about.pairs.slice(0, 3).map((pair) => pair.join(" ")).join(", ");
      const cell = make("div", p === null ? "rl-cell rl-empty" : "rl-cell", row, "", {
        role: "gridcell", tabindex: "-1", "aria-label": `${about.word}, ${about.name}: ${numbers}`, "aria-selected": "false",
      });
      cell.style.gridArea = `${token + 1} / ${layer + 2}`;
      if (p !== null) cell.style.backgroundColor = colour(this.trace, p);
      Object.assign(cell.dataset, { token, layer });
      return cell;
    }));
  }

  addAxis(row, layers) {
    const step = [1, 2, 5, 10, 20, 50].find((x) => layers / x <= 8) ?? 100;
    this.ticks = Array.from({ length: layers }, (_, layer) => {
      const shown = layer % step === 0;
      const tick = make("div", "rl-tick", this.grid, "", { "aria-hidden": "true", title: `choose layer ${layer}` });
      make("span", "", tick, shown ? layer : "");
      tick.classList.toggle("rl-major", shown);
      tick.style.gridArea = `${row + 1} / ${layer + 2}`;
      tick.addEventListener("click", () => this.view.choose({ layer }));
      return tick;
    });
  }

  addBar() {
    const { limits: [low, high], p_clean, p_corrupted, base, metric, colours } = this.trace;
    const bar = make("div", "rl-bar", this.box, "", { role: "img" });
    const strip = make("div", "rl-strip", bar);
    strip.style.background = `linear-gradient(to right, ${colours.filter((_, i) => i % 4 === 0).join(",")})`;
    const at = (p) => `${100 * Math.max(0, Math.min(1, (p - low) / (high - low)))}%`;
    make("i", "rl-pin rl-corrupted", strip).style.left = at(p_corrupted);
    make("i", p_clean > high ? "rl-pin rl-clean rl-beyond" : "rl-pin rl-clean", strip).style.left = at(p_clean);
    this.needle = make("i", "rl-needle", strip);
    this.needle.hidden = true;
    this.at = at;
    const ends = make("div", "rl-ends", bar);
    for (const text of [number(low), metric, number(high)]) make("span", "", ends, text);
    const key = make("div", "rl-key", bar);
    const placed = (p) => number(p) + (p < low || p > high ? ", beyond the scale" : "");
    make("span", "rl-corrupted", key, `corrupted ${placed(p_corrupted)}`);
    make("span", "rl-clean", key, `clean ${placed(p_clean)}`);
    bar.setAttribute("aria-label", `colours from ${number(low)} to ${number(high)}, white at ${number(base)}; ` +
      `corrupted ${number(p_corrupted)}, clean ${number(p_clean)}`);
  }

  listen() {
    const cellOf = (event) => event.target.closest?.(".rl-cell");
    const point = (event) => {
      const cell = cellOf(event);
      if (cell) this.view.point(this, +cell.dataset.token, +cell.dataset.layer);
    };
    this.grid.addEventListener("pointerover", point);
    this.grid.addEventListener("focusin", point);
    this.grid.addEventListener("pointerleave", () => this.view.point(null));
    this.grid.addEventListener("focusout", () => this.view.point(null));
    this.grid.addEventListener("click", (event) => {
      const cell = cellOf(event);
      if (cell) this.click(+cell.dataset.token, +cell.dataset.layer);
    });
    this.grid.addEventListener("keydown", (event) => this.key(event, cellOf(event)));
    this.cells[0][0].tabIndex = 0;
  }

  key(event, cell) {
    if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
    const [token, layer] = [+cell.dataset.token, +cell.dataset.layer];
    const within = (x, n) => Math.max(0, Math.min(n - 1, x));
    if (event.key in MOVES) {
      const [down, right] = MOVES[event.key];
      this.focus(within(token + down, this.cells.length), within(layer + right, this.trace.layers.length));
    } else if (event.key === "Enter" || event.key === " ") this.click(token, layer);
    else if (event.key === "Escape") this.view.close();
    else return;
    event.preventDefault();
    event.stopPropagation(); // the notebook's own shortcuts move between its cells
  }

  focus(token, layer) {
    this.grid.querySelector(".rl-cell[tabindex='0']").tabIndex = -1;
    this.cells[token][layer].tabIndex = 0;
    this.cells[token][layer].focus({ preventScroll: false });
  }

  click(token, layer) {
    this.focus(token, layer);
    this.view.choose({ selected: [token, layer], layer });
    this.view.ask(this, token, layer);
  }

  place(name, token, layer, endToken, endLayer) {
    const mark = this.marks[name];
    mark.hidden = !(token < endToken && layer < endLayer && endLayer <= this.trace.layers.length);
    mark.style.gridArea = `${token + 1} / ${layer + 2} / ${endToken + 1} / ${endLayer + 2}`;
  }

  // Outline what the cell's run restores, and all that can differ from the corrupted run for it.
  outline(token, layer) {
    const [first, last] = this.trace.layers[layer];
    const tokens = this.cells.length;
    this.place("run", token, first, token + 1, last + 1);
    this.place("reach", token, first + 1, token < this.trace.subject[0] ? token : tokens, this.trace.layers.length);
    const p = this.trace.p[token][layer];
    this.needle.hidden = p === null;
    if (p !== null) this.needle.style.left = this.at(p);
  }

  clear() {
    for (const name of ["run", "reach", "echo"]) this.marks[name].hidden = true;
    this.needle.hidden = true;
  }
}

class View {
  constructor(model, el) {
    Object.assign(this, { model, picture: model.get("picture") });
    this.root = make("div", "rl-show", el);
    const prompt = make("div", "rl-prompt", this.root, `${this.picture.prompt} \u2026 `);
    make("span", "", prompt, [...new Set(this.picture.traces.map((trace) => trace.answer))].join(" / "));
    const panels = make("div", "rl-panels", this.root);
    const most = Math.max(...this.picture.traces.map((trace) => trace.layers.length));
    panels.style.cssText = `--layers: ${most}; --panels: ${this.picture.traces.length}`;
    this.panels = this.picture.traces.map((trace, index) => new Panel(this, trace, index, panels));
    const foot = make("div", "rl-foot", this.root);
    this.hint = make("div", "rl-hint", foot);
    if (model.get("saves")) this.addSaves(foot);
    this.answers = make("div", "rl-answers", this.root, "", { role: "region", "aria-live": "polite", "aria-label": "Answers" });
    this.answers.hidden = true;
    this.answers.addEventListener("keydown", (event) => event.key === "Escape" && (this.close(), event.stopPropagation()));
    this.tip = make("div", "rl-tip", this.root, "", { role: "tooltip", popover: "manual" });
    this.showChosen();
  }

  addSaves(foot) {
    const saves = make("div", "rl-saves", foot, "Save as ");
    for (const suffix of ["png", "pdf", "csv"]) {
      const button = make("button", "rl-save", saves, suffix.toUpperCase(), { title: `Download as ${suffix.toUpperCase()}` });
      button.addEventListener("click", () => this.model.send({ ask: "file", suffix }));
    }
  }

  point(panel, token, layer) {
    this.panels.forEach((each) => each.clear());
    if (this.tip.matches(":popover-open")) this.tip.hidePopover();
    if (!panel) return;
    panel.outline(token, layer);
    this.panels.filter((x) => x !== panel).forEach((x) => x.place("echo", token, layer, token + 1, layer + 1));
    const about = facts(this.picture, panel.trace, token, layer);
    this.tip.replaceChildren();
    make("code", "", make("div", "rl-name", this.tip), about.word).after(` ${about.name}`);
    const list = make("div", "rl-facts", this.tip);
    for (const pair of about.pairs) pair.forEach((text, i) => make("span", i ? "rl-value" : "rl-what", list, text));
    if (about.remark) make("div", "rl-remark", this.tip, about.remark);
    const [cell, run, grid] = [panel.cells[token][layer], panel.marks.run, panel.grid].map((x) => x.getBoundingClientRect());
    this.showTip(cell, run.left, grid.bottom);
  }

  // Where it hides nothing that the restoration reaches: above the cell, left of the run, or below the grid; in the window.
  showTip(cell, left, bottom) {
    this.tip.showPopover?.();
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const place = (x, most) => `${Math.max(4, Math.min(most - 4, x))}px`;
    const above = cell.top - height - 8;
    const beside = above < 4 && left - width - 8 >= 4;
    const top = above >= 4 ? above : beside ? cell.top - height / 2 : Math.min(bottom, cell.bottom + 160) + 8;
    this.tip.style.left = place(beside ? left - width - 8 : cell.left - width / 2, window.innerWidth - width);
    this.tip.style.top = place(top, window.innerHeight - height);
  }

  choose(values) {
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.model.save_changes();
    this.showChosen();
  }

  showChosen() {
    const [layer, selected] = [this.model.get("layer"), this.model.get("selected")];
    this.hint.textContent = (layer === null ? "" : `Dashed: layer ${layer}. `) + HINT + (this.picture.has_model ? HINT_OF_RUNS : "") + ".";
    for (const panel of this.panels) {
      panel.marks.column.hidden = true;
      if (layer !== null) panel.place("column", 0, layer, panel.cells.length, layer + 1);
      panel.ticks.forEach((tick, x) => tick.classList.toggle("rl-chosen", x === layer));
      panel.cells.flat().forEach((cell) => cell.setAttribute("aria-selected", "false"));
      if (selected) panel.cells[selected[0]]?.[selected[1]]?.setAttribute("aria-selected", "true");
    }
  }

  ask(panel, token, layer) {
    this.question = { trace: panel.index, token, layer };
    const about = facts(this.picture, panel.trace, token, layer);
    this.heading = `${panel.trace.title}: ${about.word}, ${about.name}`;
    if (!this.picture.has_model) return this.open().append(sentence("To see what the runs say, give the model: rl.show(trace, lm)."));
    this.open().append(sentence("Asking the model \u2026"));
    this.model.send({ ask: "answers", ...this.question });
  }

  open() {
    this.answers.hidden = false;
    this.answers.replaceChildren();
    const head = make("div", "rl-head", this.answers);
    make("b", "", head, this.heading);
    const close = make("button", "rl-close", head, "\u00d7", { "aria-label": "Close the answers", title: "Close (Escape)" });
    close.addEventListener("click", () => this.close());
    return this.answers;
  }

  close() {
    this.point(null);
    const { question } = this;
    if (this.answers.contains(document.activeElement)) this.panels[question.trace].focus(question.token, question.layer);
    this.answers.hidden = true;
    this.question = null;
  }

  receive(message) {
    const { question } = this; // what comes late for another cell is not shown
    if (!question || ["trace", "token", "layer"].some((name) => question[name] !== message[name])) return;
    const box = this.open();
    if (message.error) return box.append(sentence(message.error, "rl-error"));
    const trace = this.picture.traces[question.trace];
    const runs = make("div", "rl-runs", box);
    for (const [name, title] of Object.entries(trace.done === "restored" ? RUNS : NEEDED)) {
      const run = message.answers[name];
      const card = make("div", "rl-run", runs);
      const samples = name !== "clean" && trace.samples > 1 ? `, mean of ${trace.samples} samples` : "";
      make("div", "rl-title", card, title + samples);
      run.top.forEach(([word, p], place) => addAnswer(card, word, p, place + 1 === run.rank, place + 1));
      if (run.rank > run.top.length) addAnswer(card, trace.answer, run.p_answer, true, run.rank);
    }
  }
}

function sentence(text, name = "") {
  return make("p", name, null, text, name ? { role: "alert" } : {});
}

function addAnswer(card, word, p, isAnswer, place) {
  const row = make("div", isAnswer ? "rl-answer rl-followed" : "rl-answer", card);
  make("span", "rl-place", row, `${place}`);
  make("code", "", row, word, { title: word });
  make("i", "", make("div", "rl-track", row)).style.width = `${100 * p}%`;
  make("span", "rl-p", row, number(p));
}

function save({ name, type, data }) {
  const link = make("a", "", document.body, "", { href: `data:${type};base64,${data}`, download: name });
  link.click();
  link.remove();
}

function render({ model, el }) {
  let view = new View(model, el);
  const chosen = () => view.showChosen();
  const receive = (message) => (message.file ? save(message.file) : view.receive(message));
  const scrolled = () => view.tip.matches(":popover-open") && view.point(null);
  const redraw = () => {
    const old = view.root;
    view = new View(model, el);
    old.replaceWith(view.root);
  };
  model.on("change:picture", redraw);
  model.on("change:selected", chosen);
  model.on("change:layer", chosen);
  model.on("msg:custom", receive);
  window.addEventListener("scroll", scrolled, true);
  return () => {
    model.off("change:picture", redraw);
    model.off("change:selected", chosen);
    model.off("change:layer", chosen);
    model.off("msg:custom", receive);
    window.removeEventListener("scroll", scrolled, true);
  };
}

export default { render };
