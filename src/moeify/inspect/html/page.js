// The page: themes, tabs, and the charts of the tab that is open.

const drawers = {
  heatmap, lines: series, bars: series, points, text: colouredText, image: colouredImage,
  choice(host, chart, label) {
    const names = Object.keys(chart.charts);
    const place = element("div");
    const show = (i) => {
      place.replaceChildren();
      drawChart(place, chart.charts[names[i]], `${label}, ${chart.label} ${names[i]}`);
    };
    if (names.length > 1) {
      const [control, select] = chooser(chart.label, names, show);
      select.value = chart.first;
      host.append(element("div", { className: "controls" }, control));
    }
    host.append(place);
    show(chart.first);
  },
  stack(host, chart, label) {
    chart.charts.forEach((part) => {
      const place = element("div");
      host.append(place);
      drawChart(place, part, label);
    });
  },
};
const drawChart = (host, chart, label) => drawers[chart.kind](host, chart, label);

const charts = JSON.parse(document.getElementById("charts").textContent);
function drawPanels(root) {
  root.querySelectorAll("[data-chart]:empty").forEach((host) => drawChart(host, charts[host.dataset.chart], host.dataset.label));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.getElementById("theme");
let theme = null;
function paintTheme() {
  document.documentElement.dataset.theme = theme || (dark.matches ? "dark" : "light");
  themeButton.textContent = document.documentElement.dataset.theme === "dark" ? "Light colours" : "Dark colours";
  redrawAll();
}
themeButton.addEventListener("click", () => {
  theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paintTheme();
});
dark.addEventListener("change", paintTheme);
themeButton.hidden = document.getElementById("hint").hidden = false;
paintTheme();

const tabs = [...document.querySelectorAll("[data-tab]")];
const list = element("div");
list.setAttribute("role", "tablist");
list.setAttribute("aria-label", "groups of panels");
function open(index, focus) {
  tabs.forEach((tab, i) => {
    const button = list.children[i];
    tab.hidden = i !== index;
    button.setAttribute("aria-selected", String(i === index));
    button.tabIndex = i === index ? 0 : -1;
  });
  if (focus) list.children[index].focus();
  list.children[index].scrollIntoView({ block: "nearest", inline: "nearest" });
  drawPanels(tabs[index]);
}
tabs.forEach((tab, i) => {
  const button = element("button", { type: "button", id: "tab-" + i, textContent: tab.dataset.tab });
  button.setAttribute("role", "tab");
  button.setAttribute("aria-controls", (tab.id = "group-" + i));
  tab.setAttribute("role", "tabpanel");
  tab.setAttribute("aria-labelledby", button.id);
  tab.querySelector(".group").hidden = true;
  button.addEventListener("click", () => open(i, false));
  button.addEventListener("keydown", (event) => {
    const next = stepped(i, tabs.length, event.key, "ArrowLeft", "ArrowRight");
    if (next === undefined) return;
    event.preventDefault();
    open(next, true);
  });
  list.append(button);
});
tabs[0].before(list);

function follow() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const index = target ? tabs.findIndex((tab) => tab.contains(target)) : -1;
  if (index >= 0) {
    open(index, false);
    target.scrollIntoView();
    target.focus({ preventScroll: true });
  }
  return index >= 0;
}
addEventListener("hashchange", follow);
addEventListener("beforeprint", () => tabs.forEach((tab) => ((tab.hidden = false), drawPanels(tab))));
if (!follow()) open(0, false);
