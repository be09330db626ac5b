"use strict";
// Draws the figures of every panel with Bokeh, from the JSON of report/curves.py.
(() => {
  const UNITS = ["updates", "epochs", "seconds"];
  const KEY = "apollo-bench " + location.pathname;
  const panels = JSON.parse(document.getElementById("curves").textContent);
  const darkScheme = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(hover: none)").matches;
  // choices by panel; they outlive the reload of a watched report
  const choices = stored();

  function stored() {
    try {
      return JSON.parse(sessionStorage.getItem(KEY)) || {};
    } catch {
      return {};
    }
  }

  function store() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(choices));
    } catch {
      // a browser that stores nothing for files
    }
  }

  function element(tag, parent, text, properties) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    Object.assign(made, properties);
    parent.append(made);
    return made;
  }

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colorOf = (curve) => (darkScheme.matches ? curve.dark : curve.color);

  function number(value) {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2).replace(/\.?0+e/, "e") : String(value);
  }

  // mean ± standard deviation, with two digits of the deviation
  function text(curve, i) {
    const std = curve.std[i];
    if (!(curve.count[i] > 1 && std > 0)) return number(curve.mean[i]);
    const digits = Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(std))));
    return `${curve.mean[i].toFixed(digits)} ± ${std.toFixed(digits)}`;
  }

  function nearest(values, wanted) {
    let best = 0;
    for (let i = 1; i < values.length; i++) {
      if (Math.abs(values[i] - wanted) < Math.abs(values[best] - wanted)) best = i;
    }
    return best;
  }

  // Write the values of all shown curves at a position on the horizontal axis.
  function read(readout, figure, unit, chosen, wanted) {
    readout.replaceChildren();
    const shown = figure.curves.filter((curve) => !chosen.hidden.includes(curve.name));
    if (wanted === undefined || !shown.length) {
      readout.textContent = touch
        ? "Tap the curves for their values."
        : "Point at the curves for their values. Drag to zoom; the round arrow goes back.";
      return;
    }
    const found = shown.map((curve) => {
      const i = nearest(curve[unit], wanted);
      return { curve, i, value: curve.mean[i], at: curve[unit][i] };
    });
    const [low, high] = [Math.min(...found.map((one) => one.at)), Math.max(...found.map((one) => one.at))];
    const about = low === high ? number(low) : `${number(low)} to ${number(high)}`;
    element("b", readout, unit === "value" ? `at ${about}` : `${about} ${unit}`);
    for (const { curve, i } of found.sort((one, other) => other.value - one.value)) {
      const entry = element("span", readout);
      element("span", entry, `${curve.symbol} `).style.color = colorOf(curve);
      entry.append(`${curve.label} ${text(curve, i)}`);
    }
  }

  // at most a dozen markers, so that the lines stay visible
  function marked(x, y) {
    const every = Math.max(1, Math.ceil(x.length / 12));
    const kept = x.map((_, i) => i).filter((i) => i % every === 0 || i === x.length - 1);
    return { x: kept.map((i) => x[i]), y: kept.map((i) => y[i]) };
  }

  function source(data) {
    return new Bokeh.ColumnDataSource({ data });
  }

  function styled(plot) {
    const text = color("--text"), line = color("--line");
    plot.background_fill_color = null;
    plot.border_fill_color = null;
    plot.outline_line_color = null;
    for (const axis of [...plot.below, ...plot.left]) {
      axis.axis_label_text_color = axis.major_label_text_color = text;
      axis.axis_line_color = axis.major_tick_line_color = line;
      axis.minor_tick_line_color = null;
      axis.axis_label_text_font_size = axis.major_label_text_font_size = "13px";
      axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif";
      axis.axis_label_text_font_style = "normal";
    }
    for (const grid of plot.center) grid.grid_line_color = line;
  }

  function draw(figure, container, chosen) {
    const byValue = figure.label !== undefined;
    const unit = byValue ? "value" : chosen.unit;
    const log = chosen.log === undefined ? figure.log : chosen.log;
    const plot = Bokeh.Plotting.figure({
      height: 300,
      sizing_mode: "stretch_width",
      x_axis_type: figure.log_x ? "log" : "linear",
      y_axis_type: log ? "log" : "linear",
      x_axis_label: byValue ? figure.label : unit,
      tools: "pan,box_zoom,wheel_zoom,reset,save",
      toolbar_location: "above",
    });
    plot.toolbar.logo = null;
    // a finger that moves scrolls the page, until a tool is chosen
    plot.toolbar.active_drag = touch ? null : plot.toolbar.tools.find((t) => t.type === "BoxZoomTool");
    plot.toolbar.active_scroll = null;
    if (figure.span && !log) plot.y_range = new Bokeh.Range1d({ start: figure.span[0], end: figure.span[1] });
    if (figure.log_span && log) {
      plot.y_range = new Bokeh.Range1d({ start: figure.log_span[0], end: figure.log_span[1] });
    }
    if (figure.ticks) {
      const [axis] = plot.below;
      axis.ticker = new Bokeh.FixedTicker({ ticks: figure.ticks });
      plot.center[0].ticker = axis.ticker;
      axis.major_label_overrides = new Map(figure.ticks.map((tick) => [tick, number(tick)]));
    }
    const byName = {};
    for (const curve of figure.curves) {
      const own = (byName[curve.name] = { mean: [], seeds: [] });
      const paint = colorOf(curve);
      const x = curve[unit];
      const data = source({
        x,
        y: curve.mean,
        low: curve.mean.map((mean, i) => mean - curve.std[i]),
        high: curve.mean.map((mean, i) => mean + curve.std[i]),
      });
      const at = { x: { field: "x" }, source: data };
      if (curve.std.some((std) => std > 0)) {
        own.mean.push(
          plot.varea({ ...at, y1: { field: "low" }, y2: { field: "high" }, fill_color: paint, fill_alpha: 0.15 }),
        );
      }
      const line = plot.line({ ...at, y: { field: "y" }, color: paint, line_width: 2 });
      const points = { x: { field: "x" }, y: { field: "y" }, source: source(marked(x, curve.mean)) };
      // filled, a cross within a circle would have the color of the circle
      const hollow = /[a-z]_(x|y|cross|dot)$/.test(curve.marker);
      const fill = hollow ? null : paint;
      own.mean.push(
        line,
        plot.scatter({ ...points, marker: curve.marker, size: hollow ? 9 : 7, line_color: paint, fill_color: fill }),
      );
      const seeds = { xs: curve.seeds.map((one) => one[unit]), ys: curve.seeds.map((one) => one.value) };
      own.seeds.push(
        plot.multi_line({
          xs: { field: "xs" }, ys: { field: "ys" }, source: source(seeds), color: paint, line_alpha: 0.8, line_width: 1,
        }),
      );
    }
    plot.add_tools(new Bokeh.CrosshairTool({ dimensions: "height", line_color: color("--quiet") }));
    styled(plot);
    element("h4", container, figure.title);
    const box = element("div", container, undefined, { className: "plot" });
    const readout = element("div", container, undefined, { className: "readout" });
    read(readout, figure, unit, chosen);
    for (const event of ["mousemove", "tap"]) {
      plot.on_event(event, ({ x }) => read(readout, figure, unit, chosen, x));
    }
    if (!touch) plot.on_event("mouseleave", () => read(readout, figure, unit, chosen));
    Bokeh.Plotting.show(plot, box);
    return byName;
  }

  function show(drawn, chosen) {
    for (const byName of drawn) {
      for (const [name, { mean, seeds }] of Object.entries(byName)) {
        const shown = !chosen.hidden.includes(name);
        for (const renderer of mean) renderer.visible = shown;
        for (const renderer of seeds) renderer.visible = shown && chosen.seeds;
      }
    }
  }

  function build(container) {
    const key = container.dataset.panel;
    const figures = panels[key];
    const timed = figures.some((figure) => figure.label === undefined);
    const chosen = (choices[key] ||= {
      unit: container.dataset.unit, seeds: false, log: undefined, hidden: [],
    });
    const bar = element("div", container, undefined, { className: "bar" });
    const chips = element("div", container, undefined, { className: "chips" });
    const charts = element("div", container, undefined, { className: "charts" });
    const curves = new Map(figures.flatMap((figure) => figure.curves.map((curve) => [curve.name, curve])));
    let drawn = [];

    function redraw() {
      charts.replaceChildren();
      drawn = figures.map((figure) =>
        draw(figure, element("figure", charts, undefined, {}), chosen),
      );
      refresh();
    }

    function refresh() {
      store();
      show(drawn, chosen);
      for (const chip of chips.children) {
        const curve = curves.get(chip.dataset.name);
        chip.setAttribute("aria-pressed", String(!chosen.hidden.includes(curve.name)));
        chip.firstChild.style.color = colorOf(curve);
      }
    }

    if (timed) {
      const group = element("span", bar, "horizontal axis ", {});
      for (const unit of UNITS) {
        const button = element("button", group, unit, { type: "button" });
        button.setAttribute("aria-pressed", String(unit === chosen.unit));
        button.onclick = () => {
          chosen.unit = unit;
          for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
          redraw();
        };
      }
    }
    if (figures.some((figure) => figure.curves.some((curve) => curve.seeds.length))) {
      const label = element("label", bar);
      const box = element("input", label, undefined, { type: "checkbox", checked: chosen.seeds });
      label.append(" single seeds");
      box.onchange = () => {
        chosen.seeds = box.checked;
        refresh();
      };
    }
    const label = element("label", bar, "vertical axis ");
    const scale = element("select", label);
    for (const [value, text] of [["", "automatic"], ["linear", "linear"], ["log", "logarithmic"]]) {
      element("option", scale, text, { value });
    }
    scale.value = chosen.log === undefined ? "" : chosen.log ? "log" : "linear";
    scale.onchange = () => {
      chosen.log = scale.value === "" ? undefined : scale.value === "log";
      redraw();
    };
    for (const [name, curve] of curves) {
      const chip = element("button", chips, undefined, {
        type: "button", title: "hide or show; double click: this one alone, or all",
      });
      chip.dataset.name = name;
      element("span", chip, `${curve.symbol} `);
      chip.append(curve.label);
      chip.onclick = () => {
        const hidden = chosen.hidden.includes(name);
        chosen.hidden = hidden ? chosen.hidden.filter((other) => other !== name) : [...chosen.hidden, name];
        refresh();
      };
      chip.ondblclick = () => {
        const others = [...curves.keys()].filter((other) => other !== name);
        const alone = others.every((other) => chosen.hidden.includes(other));
        chosen.hidden = alone ? [] : others;
        refresh();
      };
    }
    redraw();
    darkScheme.addEventListener("change", redraw);
  }

  // a panel is drawn when it comes near the screen
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((one) => one.isIntersecting)) {
        near.unobserve(entry.target);
        build(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  Bokeh.set_log_level("warn");
  for (const container of document.querySelectorAll("[data-panel]")) near.observe(container);

  const refreshed = document.body.dataset.refresh;
  if (refreshed) setTimeout(() => location.reload(), 1000 * Number(refreshed));
})();
