// SPDX-License-Identifier: Apache-2.0
// Draws the page's plots from the JSON beside it, with uPlot. All text from there goes in as text, never as markup.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const root = document.documentElement;
  const viridis = {
    light: ["#440154", "#414487", "#2a788e", "#22a884", "#6b9c1f"],
    dark: ["#8f7ee0", "#6aa0dc", "#3dbbb4", "#7ad151", "#fde725"],
  };
  const darkMedia = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;

  const variable = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  function colorOf(series) {
    if (series.ramp === undefined) return variable(series.color);
    const stops = viridis[darkMedia.matches && !printing ? "dark" : "light"];
    const at = series.ramp * (stops.length - 1);
    const [from, to] = [stops[Math.floor(at)], stops[Math.ceil(at)]];
    const channel = (color, i) => parseInt(color.slice(1 + 2 * i, 3 + 2 * i), 16);
    const mixed = [0, 1, 2].map((i) => Math.round(channel(from, i) + (at % 1) * (channel(to, i) - channel(from, i))));
    return `rgb(${mixed.join(" ")})`;
  }

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
  }

  // Ticks of a logarithmic axis: all or some powers of ten, or some of their multiples where there are few.
  function decades(plot, axis, low, high) {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const span = Math.log10(high / low);
    const factors = span > 2.5 ? [1] : span > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
    const every = Math.ceil(span / 7);
    const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i).filter((power) => power % every === 0);
    return powers.flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`))).filter((at) => low <= at && at <= high);
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function marker(shape, x, y, r) {
    const path = new Path2D();
    const corners = {
      diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
      triangle: [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]],
      inverted: [[0, 1.2], [1.1, -0.9], [-1.1, -0.9]],
    }[shape];
    if (corners) {
      corners.forEach(([dx, dy], i) => path[i ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
      path.closePath();
    } else path.arc(x, y, r, 0, 2 * Math.PI);
    return path;
  }

  // Error bars and markers of one series; what did not converge is hollow, an end that is not known runs out of the plot.
  function drawPoints(plot, series) {
    const { ctx, bbox } = plot;
    const px = uPlot.pxRatio;
    const color = colorOf(series);
    const place = (value, missing) => (value === null ? missing : plot.valToPos(value, "y", true));
    ctx.strokeStyle = color;
    ctx.setLineDash([]);
    series.x.forEach((at, i) => {
      if (series.y[i] === null) return;
      const x = plot.valToPos(at, "x", true);
      const y = place(series.y[i]);
      if (series.low) {
        const bottom = place(series.low[i], bbox.top + bbox.height);
        const top = series.open?.[i] ? bbox.top : place(series.high[i], y);
        ctx.lineWidth = px * 1.5;
        ctx.beginPath();
        ctx.moveTo(x, bottom);
        ctx.lineTo(x, top);
        for (const end of series.open?.[i] ? [bottom] : [bottom, top]) {
          ctx.moveTo(x - 4 * px, end);
          ctx.lineTo(x + 4 * px, end);
        }
        ctx.stroke();
      }
      if (!series.marker) return;
      const path = marker(series.marker, x, y, 4 * px);
      ctx.lineWidth = 1.5 * px;
      ctx.fillStyle = series.hollow?.[i] || series.marker === "diamond" ? variable("page") : color;
      ctx.fill(path);
      ctx.stroke(path);
      if (!series.tag) return;
      const right = x < bbox.left + 0.9 * bbox.width;
      ctx.font = `${13 * px}px system-ui, sans-serif`;
      ctx.fillStyle = variable("ink");
      ctx.textAlign = right ? "left" : "right";
      ctx.fillText(series.tag, x + (right ? 8 : -8) * px, y - 6 * px);
    });
  }

  // Columns that hold the ends of the error bars: drawn by no line, but part of the range of the axis.
  const hidden = { paths: () => null, points: { show: false } };

  function draw(chart) {
    const figure = document.getElementById(chart.id);
    const holder = figure.querySelector(".plot");
    const columns = []; // index of each series among uPlot's
    const tables = [];
    const shown = [{}];
    for (const series of chart.series) {
      columns.push(shown.length);
      tables.push([series.x, series.y, ...(series.low ? [series.low, series.high] : [])]);
      shown.push({
        label: series.label,
        stroke: () => colorOf(series),
        width: series.width ?? (series.ramp === undefined ? 1.5 : 1),
        dash: series.dash ? [6, 4] : undefined,
        points: { show: false },
        ...(series.line === false ? { paths: () => null } : {}),
      });
      if (series.low) shown.push({ ...hidden }, { ...hidden });
    }
    const expand = 2; // a gap is a gap also where another series has points
    const data = uPlot.join(tables, tables.map((table) => table.map(() => expand)));
    // A value, with its interval if it has one; null where there is none.
    const text = (series, column, row) => {
      const value = data[column][row];
      if (value === null || value === undefined) return null;
      return series.text?.[series.x.indexOf(data[0][row])] ?? format(value);
    };
    const [first, last] = [data[0][0], data[0][data[0].length - 1]];

    const axis = (label, more) => ({
      label,
      stroke: () => variable("muted"),
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
      labelSize: 22,
      grid: { stroke: () => variable("grid"), width: 1 },
      ticks: { stroke: () => variable("grid"), width: 1, size: 5 },
      ...more,
    });
    // The logged point nearest to the cursor; series are logged at different steps.
    const nearest = (plot, column, index) => {
      const values = plot.data[column];
      for (let distance = 0; distance < values.length; distance++) {
        for (const at of [index - distance, index + distance]) {
          if (values[at] !== null && values[at] !== undefined) {
            const apart = Math.abs(plot.valToPos(data[0][at], "x") - plot.valToPos(data[0][index], "x"));
            return apart < 12 ? at : index;
          }
        }
      }
      return index;
    };
    const margin = first === last ? 1 : 0.02 * (last - first);
    const options = {
      width: holder.clientWidth,
      height: 280,
      padding: [12, 14, 0, 0],
      legend: { show: false },
      cursor: { y: false, dataIdx: nearest, focus: { prox: chart.series.length > 6 ? 24 : -1 }, drag: { x: true, y: false } },
      focus: { alpha: 0.25 },
      scales: {
        x: { time: false, range: (plot, low, high) => (low <= first && high >= last ? [first - margin, last + margin] : [low, high]) },
        y: chart.log ? { distr: 3, range: (plot, low, high) => [low / 1.3, high * 1.3] } : {},
      },
      axes: [
        axis(chart.x, { values: (plot, splits) => splits.map(format), size: 32, space: 60, incrs: chart.x === "optimizer step" ? [1, 2, 5].flatMap((n) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6].map((m) => n * m)).sort((a, b) => a - b) : undefined }),
        axis(chart.y, { values: (plot, splits) => splits.map(format), size: 64, ...(chart.log ? { splits: decades, filter: (plot, splits) => splits } : {}) }),
      ],
      series: shown,
      hooks: {
        draw: [
          (plot) => {
            const { ctx, bbox } = plot;
            ctx.save();
            ctx.beginPath();
            ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
            ctx.clip();
            chart.series.forEach((series, i) => plot.series[columns[i]].show && drawPoints(plot, series));
            ctx.restore();
          },
        ],
        setCursor: [(plot) => showValues(plot)],
      },
    };
    const plot = new uPlot(options, data, holder);
    holder.addEventListener("keydown", (event) => {
      const { left } = plot.cursor;
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") plot.setScale("x", { min: first, max: last });
      if (steps === undefined) return;
      event.preventDefault();
      const now = left >= 0 ? plot.posToIdx(left) : steps > 0 ? -1 : data[0].length;
      const to = Math.max(0, Math.min(data[0].length - 1, now + steps));
      plot.setCursor({ left: plot.valToPos(data[0][to], "x"), top: 1 });
      const values = chart.series.map((series, i) => [series.label, text(series, columns[i], plot.cursor.idxs[columns[i]])]);
      const told = values.filter(([, value]) => value !== null);
      figure.querySelector(".live").textContent =
        `${chart.x} ${format(data[0][to])}: ${told.map((pair) => pair.join(" ")).join(", ")}`;
    });

    // The legend: each entry shows or hides its series and holds its value at the cursor.
    const place = element("span", { class: "at" });
    const values = chart.series.map(() => element("span", { class: "value" }));
    const swatches = chart.series.map((series) =>
      element("span", { class: `swatch ${series.marker ?? ""} ${series.dash ? "dash" : ""}` }));
    const entries = chart.series.map((series, i) => {
      const button = element("button", { type: "button", "aria-pressed": "true" }, swatches[i], series.label, " ", values[i]);
      button.addEventListener("click", () => {
        const show = button.getAttribute("aria-pressed") === "false";
        button.setAttribute("aria-pressed", show);
        const extra = series.low ? [1, 2] : [];
        plot.batch(() => [0, ...extra].forEach((offset) => plot.setSeries(columns[i] + offset, { show })));
      });
      return element("li", {}, button);
    });
    holder.before(element("ul", { class: "legend", "aria-label": "Legend; press an entry to hide or show it" }, ...entries));
    const hints = [
      chart.series.some((series) => series.hollow?.includes(true)) && "Hollow: not converged, the interval is wider than asked for.",
      chart.series.some((series) => series.open?.includes(true)) && "A bar that runs out of the plot: no upper end is known.",
    ].filter(Boolean);
    if (hints.length) holder.after(element("p", { class: "hint" }, hints.join(" ")));
    holder.after(place);
    function showValues(plot) {
      const off = plot.cursor.left === undefined || plot.cursor.left < 0;
      place.textContent = off ? "" : `${chart.x} ${format(data[0][plot.cursor.idx])}`;
      values.forEach((value, i) => {
        value.textContent = (off ? null : text(chart.series[i], columns[i], plot.cursor.idxs[columns[i]])) ?? "";
      });
    }
    const paint = () => {
      swatches.forEach((swatch, i) => swatch.style.setProperty("--color", colorOf(chart.series[i])));
      plot.redraw(false);
    };
    paint();
    const resize = (width) => width > 0 && plot.setSize({ width, height: options.height });
    new ResizeObserver(() => printing || resize(holder.clientWidth)).observe(holder);
    table(figure.querySelector("details"), chart, data, text, columns);
    return { paint, resize, holder };
  }

  // The plot's numbers as a table, made when it is asked for.
  function table(details, chart, data, text, columns) {
    const fill = () => {
      const heads = [chart.x, ...chart.series.map((series) => series.label)];
      const rows = data[0].map((x, row) => {
        const cells = chart.series.map((series, i) => {
          return element("td", {}, text(series, columns[i], row) ?? "–");
        });
        return element("tr", {}, element("th", { scope: "row" }, format(x)), ...cells);
      });
      const header = element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)));
      details.querySelector(".scroll").append(
        element("table", {}, element("thead", {}, header), element("tbody", {}, ...rows)));
    };
    details.addEventListener("toggle", () => details.querySelector("table") || fill());
  }

  const plots = charts.map(draw);
  const repaint = () => plots.forEach(({ paint }) => paint());
  darkMedia.addEventListener("change", repaint);
  const print = (on) => {
    printing = on;
    root.classList.toggle("printing", on);
    plots.forEach(({ resize, holder }) => resize(on ? 640 : holder.clientWidth));
    repaint();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
