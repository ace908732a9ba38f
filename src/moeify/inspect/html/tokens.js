// Texts and images whose tokens have the colour of their first expert, in a layer that the reader chooses.

const commonFactor = (a, b) => (b ? commonFactor(b, a % b) : a);

/** Hues are evenly spaced over the experts, and those of neighbouring experts far apart; lightness suits the ink. */
function expertColour(expert, count, alpha = 1) {
  let turn = Math.max(1, Math.round(0.382 * count));
  while (commonFactor(turn, count) > 1) turn++;
  const [lightness, chroma] = css("--token").split(" ").map(Number);
  return `oklch(${lightness - (expert % 2) * 0.05} ${chroma} ${(((expert * turn) % count) / count) * 360} / ${alpha})`;
}

function chooser(label, names, onChange) {
  const select = element("select");
  names.forEach((name, i) => select.append(element("option", { value: i, textContent: name })));
  select.addEventListener("change", () => onChange(+select.value));
  return [element("label", {}, label, select), select];
}

/** The experts of a token in words, with their weights. */
function chosen(chart, experts, weights, layer, token, count) {
  const found = [];
  for (let k = 0; k < chart.k; k++) {
    const at = (layer * count + token) * chart.k + k;
    if (experts[at] !== UNKNOWN) found.push(weights && !Number.isNaN(weights[at]) ? `${experts[at]} (${weights[at].toFixed(2)})` : String(experts[at]));
  }
  return found.length ? (found.length > 1 ? "experts " : "expert ") + found.join(", ") : "no expert";
}

function colouredText(host, chart, label) {
  const count = chart.tokens.length;
  const experts = unpack(chart.experts);
  const weights = chart.weights && unpackValues(chart.weights, ...chart.range);
  let [layer, here] = [0, null];
  const text = element("div", { className: "text", tabIndex: 0 });
  text.setAttribute("role", "application");
  text.setAttribute("aria-roledescription", "text coloured by expert");
  text.setAttribute("aria-label", label + ". Arrow keys move from token to token, the experts are read below.");
  const said = element("output");
  said.setAttribute("aria-live", "polite");
  const legend = element("div", { className: "legend" });
  const spans = chart.tokens.map((token) => element("span", { textContent: token }));
  text.append(...spans);
  const first = (token) => experts[(layer * count + token) * chart.k];
  function paint() {
    const loads = new Map();
    spans.forEach((span, i) => {
      const expert = first(i);
      span.style.background = expert === UNKNOWN ? "transparent" : expertColour(expert, chart.num_experts[layer]);
      if (expert !== UNKNOWN) loads.set(expert, (loads.get(expert) || 0) + 1);
    });
    const most = [...loads].sort((a, b) => b[1] - a[1]);
    legend.replaceChildren(...most.slice(0, 10).map(([expert, n]) => {
      const swatch = element("i", { className: "swatch" });
      swatch.style.background = expertColour(expert, chart.num_experts[layer]);
      return element("span", {}, swatch, `expert ${expert}: ${n}`);
    }), ...(most.length > 10 ? [`and ${most.length - 10} more`] : []));
    if (here !== null) mark(here);
  }
  function mark(token) {
    here = token;
    const expert = first(token);
    spans.forEach((span, i) => {
      span.className = (i === token ? "here " : "") + (expert !== UNKNOWN && first(i) === expert ? "same" : "");
    });
    said.textContent = `token ${token + 1} of ${count}, “${chart.tokens[token]}”, layer ${chart.layers[layer]}: ` + chosen(chart, experts, weights, layer, token, count);
  }
  const point = (event) => {
    const at = spans.indexOf(event.target);
    if (at >= 0) mark(at);
  };
  text.addEventListener("pointerover", point);
  text.addEventListener("pointerdown", point);
  text.addEventListener("keydown", (event) => {
    const at = here === null ? 0 : here;
    const key = { ArrowUp: "ArrowLeft", ArrowDown: "ArrowRight" }[event.key] || event.key;
    const next = stepped(at, count, key, "ArrowLeft", "ArrowRight");
    if (next === undefined) return;
    event.preventDefault();
    mark(here === null ? 0 : next);
    spans[here].scrollIntoView({ block: "nearest" });
  });
  const [control] = chooser("layer", chart.layers, (value) => ((layer = value), paint()));
  host.append(element("div", { className: "controls" }, control), legend, text, said);
  redraws.add(paint);
  paint();
}

function colouredImage(host, chart, label) {
  const [rows, columns] = chart.grid;
  const [height, width] = chart.size;
  const count = rows * columns;
  const experts = unpack(chart.experts);
  const weights = chart.weights && unpackValues(chart.weights, ...chart.range);
  const bytes = Uint8Array.from(atob(chart.pixels), (c) => c.charCodeAt(0));
  const picture = element("canvas", { width, height });
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) pixels.data.set([bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2], 255], 4 * i);
  picture.getContext("2d").putImageData(pixels, 0, 0);
  let [layer, strength] = [0, 0.55];
  const [control] = chooser("layer", chart.layers, (value) => ((layer = value), redrawAll()));
  const slider = element("input", { type: "range", min: 0, max: 1, step: 0.05, value: strength });
  slider.addEventListener("input", () => ((strength = +slider.value), redrawAll()));
  host.append(element("div", { className: "controls" }, control, element("label", {}, "colour", slider)));
  plot(host, label, (room) => [Math.min(room, 480), (Math.min(room, 480) * height) / width], (c, w, h, cursor) => {
    c.imageSmoothingEnabled = false;
    c.drawImage(picture, 0, 0, w, h);
    const [cw, ch] = [w / columns, h / rows];
    for (let i = 0; i < count; i++) {
      const expert = experts[(layer * count + i) * chart.k];
      if (expert === UNKNOWN) continue;
      c.fillStyle = expertColour(expert, chart.num_experts[layer], strength);
      c.fillRect((i % columns) * cw, Math.floor(i / columns) * ch, cw, ch);
      c.fillStyle = css("--ink");
      c.textAlign = "center";
      c.textBaseline = "middle";
      if (cw <= 26 || !strength) continue;
      const name = [String(expert), ((i % columns) + 0.5) * cw, (Math.floor(i / columns) + 0.5) * ch];
      c.strokeStyle = css("--card");
      c.lineWidth = 3;
      c.strokeText(...name);
      c.fillText(...name);
    }
    if (cursor !== null) {
      c.strokeStyle = css("--focus");
      c.lineWidth = 3;
      c.strokeRect((cursor % columns) * cw + 1, Math.floor(cursor / columns) * ch + 1, cw - 2, ch - 2);
    }
    return {
      first: 0,
      pick: (x, y) => {
        const [i, j] = [Math.floor(y / ch), Math.floor(x / cw)];
        return i >= 0 && j >= 0 && i < rows && j < columns ? i * columns + j : null;
      },
      move: (at, key) => {
        const [i, j] = [Math.floor(at / columns), at % columns];
        if (key === "ArrowUp") return Math.max(0, i - 1) * columns + j;
        if (key === "ArrowDown") return Math.min(rows - 1, i + 1) * columns + j;
        const next = stepped(j, columns, key, "ArrowLeft", "ArrowRight");
        return next === undefined ? undefined : i * columns + next;
      },
      say: (at) => `patch ${Math.floor(at / columns)}, ${at % columns}, layer ${chart.layers[layer]}: ` + chosen(chart, experts, weights, layer, at, count),
    };
  });
}
