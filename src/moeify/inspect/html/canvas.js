"use strict";
// Heatmaps, lines, bars and points on a canvas. Each can be read by pointer, touch and arrow keys: what the cursor is on
// stands in words below.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.length > 4 ? hex.slice(i, i + 2) : hex[(i + 1) / 2].repeat(2), 16));
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const words = (value, digits) => {
  if (value === null || Number.isNaN(value)) return "none";
  if (digits === undefined) return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(digits);
};
const UNKNOWN = 65535;

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

function unpackValues(text, low, high) {
  return Float64Array.from(unpack(text), (n) => (n === UNKNOWN ? NaN : low + (n * (high - low)) / (UNKNOWN - 1)));
}

function mixed(stops, position) {
  const at = Math.min(Math.max(position, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return "rgb(" + stops[i].map((c, j) => Math.round(c + (stops[i + 1][j] - c) * (at - i))).join(" ") + ")";
}

const stopsOf = (scale) =>
  (scale === "plain" ? ["--seq0", "--seq1", "--seq2", "--seq3"] : ["--low2", "--low1", "--mid", "--high1", "--high2"])
    .map((name) => channels(css(name)));

/** A focusable canvas with a cursor; `draw(context, width)` returns {height, pick(x, y), move(key), say(), mark()}. */
function plot(host, label, width, paint) {
  const canvas = element("canvas");
  const box = element("div", { className: "plot", tabIndex: 0 }, canvas);
  box.setAttribute("role", "application");
  box.setAttribute("aria-roledescription", "chart");
  box.setAttribute("aria-label", label + ". Arrow keys move the cursor, its value is read below.");
  const said = element("output");
  said.setAttribute("aria-live", "polite");
  const wide = element("p", { className: "note", textContent: "Scroll the chart sideways for the rest →", hidden: true });
  host.append(wide, box, said);
  let cursor = null;
  let painted = null;
  function draw() {
    const room = host.clientWidth;
    if (!room) return;
    const [w, h] = width(room);
    const ratio = window.devicePixelRatio || 1;
    wide.hidden = w <= room + 1;
    canvas.width = w * ratio;
    canvas.height = h * ratio;
    canvas.style.width = w + "px";
    canvas.style.height = h + "px";
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "12px system-ui, sans-serif";
    painted = paint(context, w, h, cursor, room);
    if (cursor !== null) said.textContent = painted.say(cursor);
  }
  const go = (next, seen) => {
    if (next === null || next === undefined) return;
    cursor = next;
    draw();
    if (seen && painted.place) {
      const [x] = painted.place(cursor);
      if (x < box.scrollLeft + 40) box.scrollLeft = x - 40;
      if (x > box.scrollLeft + box.clientWidth - 40) box.scrollLeft = x - box.clientWidth + 40;
    }
  };
  const point = (event) => {
    const at = canvas.getBoundingClientRect();
    if (painted) go(painted.pick(event.clientX - at.left, event.clientY - at.top));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  box.addEventListener("focus", () => cursor === null && painted && box.matches(":focus-visible") && go(painted.first, true));
  box.addEventListener("keydown", (event) => {
    if (!painted) return;
    const next = painted.move(cursor === null ? painted.first : cursor, event.key);
    if (next === undefined) return;
    event.preventDefault();
    go(next, true);
  });
  redraws.add(draw);
  sized.observe(host);
  draw();
}

const redraws = new Set();
const redrawAll = () => redraws.forEach((draw) => draw());
const sized = new ResizeObserver(() => requestAnimationFrame(redrawAll));
const stepped = (at, count, key, back, on) => {
  if (key === back) return Math.max(0, at - 1);
  if (key === on) return Math.min(count - 1, at + 1);
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  return undefined;
};

function heatmap(host, chart, label) {
  const [rows, columns] = chart.size;
  const values = unpackValues(chart.values, chart.low, chart.high);
  const reach = chart.scale === "signed" ? Math.max(Math.abs(chart.low), Math.abs(chart.high)) || 1 : 1;
  const place = {
    ratio: (v) => (Math.log2(Math.max(v, 1e-9)) + 3) / 6,
    signed: (v) => (v / reach + 1) / 2,
    plain: (v) => (chart.high > 0 ? v / chart.high : 0),
  }[chart.scale];
  const ends = { ratio: ["1/8", "8 " + chart.unit], signed: [words(-reach), words(reach) + " " + chart.unit], plain: ["0", words(chart.high) + " " + chart.unit] }[chart.scale];
  const bar = element("canvas", { className: "bar", width: 144, height: 8 });
  const legend = element("div", { className: "legend" }, ends[0], bar, ends[1]);
  const dead = chart.scale === "ratio" ? element("span", {}, element("i", { className: "swatch" }), "0, " + chart.zero) : null;
  if (dead && values.includes(0)) legend.append(dead);
  if (values.some(Number.isNaN)) legend.append(element("span", {}, element("i", { className: "swatch blank" }), chart.blank));
  host.append(legend);
  const name = (list, i) => (list ? list[i] : String(i));
  const longest = Math.max(...Array.from({ length: rows }, (_, i) => String(name(chart.rows, i)).length));
  const left = Math.min(150, 14 + 7 * longest);
  const named = chart.rows.some((text) => Number.isNaN(+text));
  const narrow = Math.max(4, Math.min(12, 300 / columns));
  const tall = named ? Math.max(14, Math.min(22, 420 / rows)) : Math.min(22, Math.max(420, Math.min(640, 5 * rows)) / rows);
  const top = 18;
  const size = (room) => [Math.max(room, left + narrow * columns), 34 + top + rows * tall];
  plot(host, label, size, (c, w, h, cursor, room) => {
    const [stops, empty, slash] = [stopsOf(chart.scale), css("--dead"), css("--slash")];
    const [cw, ch] = [Math.min(96, (w - left) / columns), (h - 34 - top) / rows];
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < columns; j++) {
        const v = values[i * columns + j];
        if (Number.isNaN(v)) continue;
        const nothing = dead && v === 0;
        const [x, y, wide, high] = [left + j * cw, top + i * ch, cw > 8 ? cw - 1 : cw + 0.2, ch > 8 ? ch - 1 : ch + 0.2];
        c.fillStyle = nothing ? empty : mixed(stops, place(v));
        c.fillRect(x, y, wide, high);
        if (nothing && cw > 6 && ch > 6) {
          c.strokeStyle = slash;
          c.lineWidth = 1;
          c.beginPath();
          c.moveTo(x + wide / 2 - 3, y + high / 2 + 3);
          c.lineTo(x + wide / 2 + 3, y + high / 2 - 3);
          c.stroke();
        }
      }
    c.fillStyle = css("--soft");
    c.textBaseline = "middle";
    c.textAlign = "right";
    const every = Math.ceil(13 / ch);
    for (let i = 0; i < rows; i += every) c.fillText(shortened(c, name(chart.rows, i), left - 12), left - 6, top + (i + 0.5) * ch);
    c.textAlign = "left";
    c.fillText(chart.row, 0, 7);
    c.textAlign = "center";
    const longestName = Math.max(...Array.from({ length: columns }, (_, j) => String(name(chart.columns, j)).length));
    const step = Math.ceil((8 + 7 * Math.min(longestName, 14)) / cw);
    for (let j = 0; j < columns; j += step) {
      const text = shortened(c, name(chart.columns, j), 100);
      c.fillText(text, Math.min(left + (j + 0.5) * cw, w - c.measureText(text).width / 2), h - 24);
    }
    c.fillText(chart.column, (left + Math.min(left + columns * cw, room)) / 2, h - 8);
    const shade = bar.getContext("2d");
    for (let x = 0; x < 144; x++) {
      shade.fillStyle = mixed(stops, x / 143);
      shade.fillRect(x, 0, 1, 8);
    }
    if (dead) dead.firstChild.style.background = empty;
    if (cursor !== null) {
      c.strokeStyle = css("--focus");
      c.lineWidth = 2;
      c.strokeRect(left + (cursor % columns) * cw - 1, top + Math.floor(cursor / columns) * ch - 1, cw + 2, ch + 2);
    }
    return {
      first: 0,
      place: (at) => [left + ((at % columns) + 0.5) * cw],
      pick: (x, y) => {
        const [i, j] = [Math.floor((y - top) / ch), Math.floor((x - left) / cw)];
        return i >= 0 && i < rows && j >= 0 && j < columns ? i * columns + j : null;
      },
      move: (at, key) => {
        const [i, j] = [Math.floor(at / columns), at % columns];
        if (key === "ArrowUp") return Math.max(0, i - 1) * columns + j;
        if (key === "ArrowDown") return Math.min(rows - 1, i + 1) * columns + j;
        const next = stepped(j, columns, key, "ArrowLeft", "ArrowRight");
        return next === undefined ? undefined : i * columns + next;
      },
      say: (at) => {
        const [i, j] = [Math.floor(at / columns), at % columns];
        return `${chart.row} ${name(chart.rows, i)}, ${chart.column} ${name(chart.columns, j)}: ${words(values[at], chart.digits)} ${chart.unit}`;
      },
    };
  });
}

function shortened(c, text, room) {
  let shown = String(text);
  while (shown.length > 1 && c.measureText(shown).width > room) shown = shown.slice(0, -2) + "…";
  return shown;
}

/** Axes with about five ticks; returns the two scales. */
function axes(c, w, h, [x0, x1], [y0, y1], chart, room) {
  const box = { left: 58, right: w - 10, top: 20, bottom: h - 42 };
  const nice = (span) => {
    const raw = span / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((f) => f * power).find((f) => f >= raw);
  };
  const sx = (x) => box.left + ((x - x0) / (x1 - x0 || 1)) * (box.right - box.left);
  const sy = (y) => box.bottom - ((y - y0) / (y1 - y0 || 1)) * (box.bottom - box.top);
  c.strokeStyle = css("--line");
  c.fillStyle = css("--soft");
  c.lineWidth = 1;
  c.textBaseline = "middle";
  c.textAlign = "right";
  const step = nice(y1 - y0 || 1);
  for (let y = Math.ceil(y0 / step) * step; y <= y1 + 1e-9 * step; y += step) {
    c.beginPath();
    c.moveTo(box.left, sy(y));
    c.lineTo(box.right, sy(y));
    c.stroke();
    c.fillText(words(Math.abs(y) < step / 1e6 ? 0 : y), box.left - 6, sy(y));
  }
  c.textAlign = "left";
  c.fillText(chart.y_label, 0, 8);
  c.textAlign = "center";
  c.fillText(chart.x_label, (box.left + Math.min(box.right, room)) / 2, h - 8);
  return { sx, sy, box, nice };
}

const finite = (list) => list.filter((v) => v !== null);
const bounds = (list, zero) => {
  let [low, high] = [Math.min(...list), Math.max(...list)];
  if (!list.length) [low, high] = [0, 1];
  if (zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  if (zero && low === high) high = 1;
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return [zero && low === 0 ? 0 : low - pad, zero && high === 0 ? 0 : high + pad];
};

/** Names of the series as buttons that hide them. */
function legendOf(host, names, hidden) {
  if (names.length < 2) return;
  const legend = element("div", { className: "legend" });
  names.forEach((name, i) => {
    const swatch = element("i", { className: "swatch" });
    redraws.add(() => (swatch.style.background = css("--s" + (i % 8))));
    swatch.style.background = css("--s" + (i % 8));
    const button = element("button", { type: "button" }, swatch, name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      hidden.has(name) ? hidden.delete(name) : hidden.add(name);
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      redrawAll();
    });
    legend.append(button);
  });
  host.append(legend);
}

function series(host, chart, label) {
  const bars = chart.kind === "bars";
  const all = Object.keys(chart.series);
  const hidden = new Set();
  legendOf(host, all, hidden);
  const named = bars || chart.x.some((x) => typeof x === "string");
  const xs = named ? chart.x.map((_, i) => i) : chart.x;
  const flat = bars && Object.values(chart.series).flat().every((v) => !v);
  const size = (room) => [Math.max(room, bars ? 70 + chart.x.length * Math.max(8, 5 * all.length) : 0), flat ? 120 : 260];
  plot(host, label, size, (c, w, h, cursor, room) => {
    const shown = all.filter((name) => !hidden.has(name));
    const heights = shown.flatMap((name) => [...finite(chart.series[name]), ...finite(((chart.band || {})[name] || []).flat())]);
    const half = bars || xs.length === 1 ? 0.5 : 0;
    const { sx, sy, box, nice } = axes(c, w, h, [Math.min(...xs) - half, Math.max(...xs) + half], bounds(heights, bars || chart.from_zero), chart, room);
    ticks(c, chart.x, xs, named, sx, box, nice);
    if (bars && heights.length && heights.every((v) => v === 0)) {
      c.textAlign = "center";
      c.fillText("0 everywhere", (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    }
    const slot = (sx(1) - sx(0)) * 0.8;
    shown.forEach((name, n) => {
      const colour = css("--s" + (all.indexOf(name) % 8));
      const [low, high] = (chart.band || {})[name] || [];
      (bars ? drawBars : drawLine)(c, { values: chart.series[name], low, high, xs, sx, sy, colour, slot, n, of: shown.length });
    });
    if (cursor !== null) {
      c.strokeStyle = css("--focus");
      c.beginPath();
      c.moveTo(sx(xs[cursor]), box.top);
      c.lineTo(sx(xs[cursor]), box.bottom);
      c.stroke();
    }
    return {
      first: 0,
      place: (at) => [sx(xs[at])],
      pick: (x) => xs.reduce((best, _, i) => (Math.abs(sx(xs[i]) - x) < Math.abs(sx(xs[best]) - x) ? i : best), 0),
      move: (at, key) => stepped(at, xs.length, key, "ArrowLeft", "ArrowRight"),
      say: (at) =>
        `${chart.x_label} ${named ? chart.x[at] : words(chart.x[at])}: ` +
        shown.map((name) => {
          const band = (chart.band || {})[name];
          const range = band && band[0][at] !== null ? ` (${words(band[0][at])} to ${words(band[1][at])})` : "";
          return (all.length > 1 ? name + " " : "") + words(chart.series[name][at]) + range;
        }).join(", ") + " " + (all.length > 1 ? "" : chart.y_label),
    };
  });
}

function ticks(c, names, xs, named, sx, box, nice) {
  c.fillStyle = css("--soft");
  c.textAlign = "center";
  const inside = (x, text) => Math.min(x, box.right + 8 - c.measureText(text).width / 2);
  if (!named) {
    const step = nice(xs[xs.length - 1] - xs[0] || 1);
    for (let x = Math.ceil(xs[0] / step) * step; x <= xs[xs.length - 1]; x += step) c.fillText(words(x), inside(sx(x), words(x)), box.bottom + 14);
    return;
  }
  const [room, gap] = [Math.max(...names.map((name) => c.measureText(name).width)), Math.max(1, sx(1) - sx(0))];
  const most = Math.max(90, gap - 10);
  const every = Math.max(1, Math.ceil((Math.min(room, most) + 10) / gap));
  for (let i = 0; i < names.length; i += every) {
    const text = shortened(c, names[i], most);
    c.fillText(text, inside(sx(i), text), box.bottom + 14);
  }
}

function drawBars(c, { values, low, high, xs, sx, sy, colour, slot, n, of }) {
  const width = Math.min(46, Math.max(1, slot / of));
  xs.forEach((x, i) => {
    if (values[i] === null) return;
    const at = sx(x) + (n - of / 2) * width;
    c.fillStyle = colour;
    c.fillRect(at, Math.min(sy(values[i]), sy(0)), Math.max(1, width - 1), Math.max(1, Math.abs(sy(0) - sy(values[i]))));
    if (low && low[i] !== null) whisker(c, at + width / 2, sy(low[i]), sy(high[i]));
  });
}

function drawLine(c, { values, low, high, xs, sx, sy, colour }) {
  c.strokeStyle = c.fillStyle = colour;
  if (low) {
    c.globalAlpha = 0.18;
    c.beginPath();
    xs.forEach((x, i) => low[i] !== null && c.lineTo(sx(x), sy(low[i])));
    [...xs.keys()].reverse().forEach((i) => high[i] !== null && c.lineTo(sx(xs[i]), sy(high[i])));
    c.fill();
    c.globalAlpha = 1;
  }
  c.lineWidth = 2;
  c.beginPath();
  let broken = true;
  xs.forEach((x, i) => {
    if (values[i] === null) return (broken = true);
    broken ? c.moveTo(sx(x), sy(values[i])) : c.lineTo(sx(x), sy(values[i]));
    broken = false;
  });
  c.stroke();
  if (xs.length <= 40) xs.forEach((x, i) => values[i] !== null && (c.beginPath(), c.arc(sx(x), sy(values[i]), 3, 0, 7), c.fill()));
}

function whisker(c, x, low, high) {
  c.strokeStyle = css("--ink");
  c.lineWidth = 1;
  c.beginPath();
  c.moveTo(x, low);
  c.lineTo(x, high);
  c.stroke();
}

function points(host, chart, label) {
  const order = [...chart.x.keys()].sort((a, b) => chart.x[a] - chart.x[b]);
  plot(host, label, (room) => [room, 300], (c, w, h, cursor, room) => {
    const heights = [...chart.y, ...(chart.band || []).flat()];
    const { sx, sy, box, nice } = axes(c, w, h, bounds(chart.x, true), bounds(finite(heights), true), chart, room);
    ticks(c, null, bounds(chart.x, true), false, sx, box, nice);
    chart.x.forEach((x, i) => {
      if (chart.band) whisker(c, sx(x), sy(chart.band[0][i]), sy(chart.band[1][i]));
      c.fillStyle = css("--s0");
      c.beginPath();
      c.arc(sx(x), sy(chart.y[i]), 4, 0, 7);
      c.fill();
    });
    nameHighest(c, chart, sx, sy, box);
    if (cursor !== null) {
      c.strokeStyle = css("--focus");
      c.lineWidth = 2;
      c.beginPath();
      c.arc(sx(chart.x[order[cursor]]), sy(chart.y[order[cursor]]), 8, 0, 7);
      c.stroke();
    }
    const far = (i, x, y) => Math.hypot(sx(chart.x[i]) - x, sy(chart.y[i]) - y);
    return {
      first: 0,
      pick: (x, y) => order.reduce((best, i, at) => (far(i, x, y) < far(order[best], x, y) ? at : best), 0),
      move: (at, key) => stepped(at, order.length, key, "ArrowLeft", "ArrowRight"),
      say: (at) => {
        const i = order[at];
        const range = chart.band ? ` (${words(chart.band[0][i])} to ${words(chart.band[1][i])})` : "";
        return `${chart.names[i]}: ${chart.x_label} ${words(chart.x[i])}, ${chart.y_label} ${words(chart.y[i])}${range}`;
      },
    };
  });
}

/** Names the three highest points that are clearly above 0, where a name does not cover another. */
function nameHighest(c, chart, sx, sy, box) {
  c.fillStyle = css("--soft");
  c.textBaseline = "middle";
  const taken = [];
  const least = chart.band ? chart.band[0] : chart.y;
  const highest = [...chart.y.keys()].filter((i) => least[i] > 0).sort((a, b) => chart.y[b] - chart.y[a]);
  for (const i of highest.slice(0, 3)) {
    const [x, y, width] = [sx(chart.x[i]), sy(chart.y[i]), c.measureText(chart.names[i]).width];
    const left = x + 8 + width > box.right ? x - 8 - width : x + 8;
    if (taken.some(([a, b, end]) => Math.abs(b - y) < 13 && left < end && left + width > a)) continue;
    c.textAlign = "left";
    c.fillText(chart.names[i], left, y);
    taken.push([left, y, left + width]);
  }
}
