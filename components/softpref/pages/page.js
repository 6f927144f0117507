"use strict";
// What makes a page more than a document: tables that sort and filter, charts, a browser of samples.
// All text is set as text, never as markup; without this script the tables, sentences and drawings remain.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = byId("data") ? JSON.parse(byId("data").textContent) : {};
  document.documentElement.classList.add("js");

  // An element with attributes (functions listen to events) and children.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // A control below its label.
  let fields = 0;
  function labelled(label, control) {
    control.id = `field-${++fields}`;
    return make("div", { class: "field" }, make("label", { for: control.id }, label), control);
  }

  function choice(label, options, chosen, change) {
    const select = make("select", { change: () => change(select.value) });
    for (const [value, text] of options) select.append(make("option", { value, selected: value === chosen }, short(text, 90)));
    return [labelled(label, select), select];
  }

  const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const digits = (value) => (value == null ? "–" : Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(3));
  const worth = ({ score, win }) => score ?? win ?? null; // of a sample, to its judge
  const mean = (values) => (values.length ? values.reduce((sum, one) => sum + one, 0) / values.length : null);

  // Tables

  function sortable(table) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = make("button", { type: "button", click: () => sort(column) }, ...header.childNodes);
      header.replaceChildren(button);
      header.setAttribute("aria-sort", "none");
    });
    const key = (row, column) => {
      const cell = row.cells[column];
      const given = cell.dataset.value ?? cell.textContent.trim();
      const number = Number(given);
      return given === "" || given === "–" ? null : Number.isNaN(number) ? given : number;
    };
    function sort(column) {
      const header = headers[column];
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((one) => one.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // what is unknown stays below
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }
  }

  function filterable(table) {
    const rows = [...table.tBodies[0].rows];
    const found = make("output", {});
    const input = make("input", { type: "search", input: () => filter() });
    function filter() {
      const wanted = input.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      found.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
    }
    const controls = make("div", { class: "controls" }, labelled(table.dataset.filter, input), found);
    table.closest(".scroll").before(controls);
  }

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("table[data-filter]").forEach(filterable);

  // Drawings that the charts replace are folded away, and unfolded in print

  const drawings = [...document.querySelectorAll("details.drawing")];
  const unfold = (open) => drawings.forEach((one) => (one.open = open));
  unfold(false);
  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));

  // Charts

  async function charting() {
    const packed = Uint8Array.from(atob(byId("library").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const text = await new Response(stream).text();
    document.head.append(make("script", {}, text)); // runs at once: the page's policy knows its hash
    return window.Plotly;
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 45rem)");
  const redraws = [];

  // The text that Plotly shows in a hover box or legend may hold a little markup; names have none.
  const literal = (text) => short(String(text), 60).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // Draw in `place`, and again when the colours of the page or its width change. `figure` gives traces, titles and ranges.
  function chart(Plotly, place, description, figure) {
    place.hidden = false;
    const canvas = make("div", { class: "canvas", role: "img", "aria-label": description });
    place.append(canvas);
    const draw = () => {
      const style = getComputedStyle(document.body);
      const [ink, line] = [style.color, dark.matches ? "#3b4046" : "#dfe2e6"];
      const { traces, x, y } = figure(ink);
      const axis = (own) => ({ gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, ...own });
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: ink, family: style.fontFamily, size: 13 },
        margin: { l: 10, r: 10, t: 10, b: 10 },
        height: narrow.matches ? 380 + 14 * traces.filter(({ showlegend }) => showlegend !== false).length : 520,
        xaxis: axis(x),
        yaxis: axis(y),
        hoverlabel: { bgcolor: dark.matches ? "#23272b" : "#ffffff", font: { color: ink }, align: "left" },
        hovermode: "closest",
        legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: { size: 12 } },
        dragmode: narrow.matches ? false : "zoom",
      };
      return Plotly.react(canvas, traces, layout, { displayModeBar: false, responsive: true });
    };
    redraws.push(draw);
    draw();
    return { canvas, draw };
  }
  for (const media of [dark, narrow]) media.addEventListener("change", () => redraws.forEach((draw) => draw()));

  const spread = (values) => values.length > 1 && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values);
  const arms = (figures) => ({
    type: "data",
    symmetric: false,
    array: figures.map(([value, , high]) => (high == null ? 0 : Math.max(0, high - value))),
    arrayminus: figures.map(([value, low]) => (low == null ? 0 : Math.max(0, value - low))),
    thickness: 1.2,
    width: 0,
  });

  function frontier(Plotly, place, { axes, views, curves, reference, lines }) {
    if (axes.length < 2) return;
    const titles = Object.fromEntries(axes.map(({ key, title, unit }) => [key, unit && unit !== "probability" ? `${title}, ${unit}` : title]));
    let x = views.length ? views[0].x : axes[0].key;
    let y = views.length ? views[0].y : axes[1].key;
    const options = axes.map(({ key, title }) => [key, title]);
    const [xLabel, xSelect] = choice("Across", options, x, (key) => show(key, y));
    const [yLabel, ySelect] = choice("Up", options, y, (key) => show(x, key));
    const buttons = views.map((view) => [view, make("button", { type: "button", click: () => show(view.x, view.y) }, view.title)]);
    place.append(
      make("div", { class: "controls" }, make("div", { class: "buttons", role: "group", "aria-label": "Views" }, ...buttons.map(([, button]) => button)), xLabel, yLabel),
    );
    const note = make("p", { class: "dim" });
    const drawn = chart(Plotly, place, "Chart of the models; their figures are in the table below.", figure);
    place.append(note);

    function show(nextX, nextY) {
      [x, y] = [nextX, nextY];
      mark();
      drawn.draw();
    }

    function mark() {
      [xSelect.value, ySelect.value] = [x, y];
      for (const [view, button] of buttons) button.setAttribute("aria-pressed", view.x === x && view.y === y);
      const absent = curves.flatMap((curve) => curve.members).filter(({ values }) => !values[x] || !values[y]);
      const optima = curves.some((curve) => curve.members.some(({ optimum }) => x in optimum && y in optimum));
      note.textContent =
        "Numbers beside points: α of SPO, β of the others." +
        (optima ? " Bars: the optimum of each one's own objective." : "") +
        (absent.length ? ` Without these figures: ${absent.map(({ name }) => name).join(", ")}.` : "");
    }

    function figure(ink) {
      const traces = [];
      for (const line of lines.filter((one) => one.x === x && one.y === y)) {
        const [a, b] = [0, 1].map((side) => line.points.map((point) => point[side]));
        traces.push({ x: a, y: b, mode: "lines", name: line.title, line: { color: ink, width: 1, shape: "spline" }, opacity: 0.55, hoverinfo: "skip" });
      }
      const places = [];
      for (const [i, { name, color, symbol, dash, members }] of curves.entries()) {
        const known = members.filter(({ values }) => values[x] && values[y]);
        if (!known.length) continue;
        const [a, b] = [x, y].map((key) => known.map(({ values }) => values[key]));
        places.push(...known.map(({ values }) => [values[x][0], values[y][0]]));
        const aims = known.filter(({ optimum }) => x in optimum && y in optimum);
        if (aims.length) {
          const ends = (key) => aims.flatMap(({ values, optimum }) => [values[key][0], optimum[key], null]);
          traces.push({ x: ends(x), y: ends(y), mode: "lines", line: { color, width: 1 }, showlegend: false, hoverinfo: "skip", legendgroup: name });
          traces.push({
            x: aims.map(({ optimum }) => optimum[x]),
            y: aims.map(({ optimum }) => optimum[y]),
            mode: "markers",
            marker: { color, symbol: "line-ew-open", size: 13, line: { width: 2.5, color } },
            hovertext: aims.map((one) => `optimum of ${literal(one.name)}`),
            hoverinfo: "text",
            showlegend: false,
            legendgroup: name,
          });
        }
        const spoken = ({ values }, key) => (values[key] ? `${literal(titles[key])}: ${digits(values[key][0])}${values[key][1] == null ? "" : ` [${digits(values[key][1])}, ${digits(values[key][2])}]`}` : "");
        const told = [...new Set([x, y, "win_rate", "expected_reward", "good_diversity", "entropy_sequence", "kl_sequence"])];
        traces.push({
          x: a.map(([value]) => value),
          y: b.map(([value]) => value),
          error_x: { ...arms(a), color: `${color}77` },
          error_y: { ...arms(b), color: `${color}77` },
          mode: "lines+markers+text",
          name: literal(name),
          legendgroup: name,
          marker: { color, symbol, size: 10, line: { color, width: symbol.endsWith("-open") ? 2 : 0 } },
          line: { color, dash, width: 1.6 },
          text: known.map(({ label }) => label),
          textposition: ["top right", "bottom left", "top left", "bottom right", "top center", "bottom center"][i % 6],
          cliponaxis: !narrow.matches, // labels at the edge of a phone are whole
          hovertext: known.map((one) => [`<b>${literal(one.name)}</b>`, ...told.map((key) => spoken(one, key)).filter(Boolean)].join("<br>")),
          hoverinfo: "text",
        });
        const ringed = known.filter(({ chosen }) => chosen);
        if (ringed.length)
          traces.push({
            x: ringed.map(({ values }) => values[x][0]),
            y: ringed.map(({ values }) => values[y][0]),
            mode: "markers",
            name: "chosen",
            marker: { symbol: "circle-open", size: 22, color: ink, line: { width: 2, color: ink } },
            hoverinfo: "skip",
            legendrank: 2000,
          });
      }
      if (x in reference && y in reference) {
        places.push([reference[x], reference[y]]);
        traces.push({ x: [reference[x]], y: [reference[y]], mode: "markers", name: "reference", marker: { symbol: "star", size: 13, color: "#8c8c8c" }, hovertext: ["reference"], hoverinfo: "text", legendrank: 1500 });
      }
      const [xs, ys] = [0, 1].map((side) => places.map((place) => place[side]));
      const scale = (values, key) => ({ title: { text: titles[key], standoff: 8 }, ...(spread(values) ? { type: "log", dtick: 1 } : { type: "linear" }) });
      const range = (values) => {
        const [low, high] = [Math.min(...values), Math.max(...values)];
        const margin = Math.max(0.12 * (high - low), 1e-3);
        return [low - margin, high + margin];
      };
      // theory's line goes on far beyond the models: it must not squeeze them
      const near = lines.some((one) => one.x === x && one.y === y) && places.length;
      return {
        traces,
        x: { ...scale(xs, x), ...(near && !spread(xs) ? { range: range(xs) } : {}) },
        y: { ...scale(ys, y), ...(near && !spread(ys) ? { range: range([...ys, ...tops(lines, xs)]) } : {}) },
      };
    }

    // The line's height at the models, so that it is seen above them.
    function tops(all, xs) {
      const { points } = all.find((one) => one.x === x && one.y === y);
      const within = points.filter(([a]) => a >= Math.min(...xs) && a <= Math.max(...xs)).map(([, b]) => b);
      return within.length ? [Math.max(...within)] : [];
    }
    mark();
  }

  function reliability(Plotly, place, models) {
    chart(Plotly, place, "Reliability diagram: share of votes by the model's confidence; the figures are in a table.", (ink) => ({
      traces: [
        { x: [0.5, 1], y: [0.5, 1], mode: "lines", name: "calibrated", line: { color: ink, width: 1, dash: "dash" }, hoverinfo: "skip" },
        ...models.map(({ name, color, bins }) => ({
          x: bins.map(([confidence]) => confidence),
          y: bins.map(([, share]) => share),
          error_y: { ...arms(bins.map(([, share, low, high]) => [share, low, high])), color: `${color}55` },
          mode: "lines+markers",
          name: literal(name),
          line: { color, width: 1.6 },
          marker: { color, size: 7 },
          hovertext: bins.map(([confidence, share, , , pairs]) => `<b>${literal(name)}</b><br>sure by ${digits(confidence)}<br>share of votes ${digits(share)}<br>${pairs} pairs`),
          hoverinfo: "text",
        })),
      ],
      x: { title: { text: "confidence of the model", standoff: 8 }, range: [0.48, 1.02] },
      y: { title: { text: "share of votes", standoff: 8 } },
    }));
  }

  // Mean score of each prompt under the two models beside one another; a click opens the prompt below.
  function prompts(Plotly, place, samples, open) {
    const side = (one, i) => mean(one.sides[i].map(worth).filter((value) => value !== null));
    const known = samples.prompts.map((one, i) => [side(one, 0), side(one, 1), one.prompt, i]).filter(([a, b]) => a != null && b != null);
    if (known.length < 2) return;
    const drawn = chart(Plotly, place, "Mean score of each prompt, of the policy and of the reference; the samples are below.", (ink) => {
      const both = known.flatMap(([a, b]) => [a, b]);
      const ends = [Math.min(...both), Math.max(...both)];
      return {
        traces: [
          { x: ends, y: ends, mode: "lines", name: "no change", line: { color: ink, width: 1, dash: "dash" }, hoverinfo: "skip" },
          {
            x: known.map(([a]) => a),
            y: known.map(([, b]) => b),
            mode: "markers",
            name: "a prompt; click to read its samples",
            marker: { color: "#2f7fc1", size: 9, opacity: 0.8 },
            hovertext: known.map(([a, b, prompt]) => `${literal(prompt)}<br>reference ${digits(a)}, policy ${digits(b)}`),
            hoverinfo: "text",
          },
        ],
        x: { title: { text: "mean score of the reference's samples", standoff: 8 } },
        y: { title: { text: "mean score of the policy's samples", standoff: 8 } },
      };
    });
    drawn.canvas.on("plotly_click", ({ points: [point] }) => point.curveNumber === 1 && open(known[point.pointIndex][3]));
  }

  // Samples

  // Words of `a` and of `b`, each with whether the other lacks it, by the longest common subsequence.
  function compare(a, b) {
    const [left, right] = [a, b].map((text) => text.match(/\S+\s*|\s+/g) || []);
    const same = (i, j) => left[i].trim() === right[j].trim();
    if (left.length * right.length > 1e6) return [[[a, false]], [[b, false]]];
    const rows = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
    for (let i = left.length - 1; i >= 0; i--)
      for (let j = right.length - 1; j >= 0; j--)
        rows[i][j] = same(i, j) ? rows[i + 1][j + 1] + 1 : Math.max(rows[i + 1][j], rows[i][j + 1]);
    const found = [[], []];
    let [i, j] = [0, 0];
    while (i < left.length || j < right.length) {
      if (i < left.length && j < right.length && same(i, j)) {
        found[0].push([left[i++], false]);
        found[1].push([right[j++], false]);
      } else if (j === right.length || (i < left.length && rows[i + 1][j] >= rows[i][j + 1])) found[0].push([left[i++], true]);
      else found[1].push([right[j++], true]);
    }
    return found;
  }

  // Neighbouring words of one kind as one piece; those that the other lacks are marked.
  function marked(words) {
    const pieces = [];
    for (const [word, differs] of words) {
      const last = pieces.at(-1);
      if (last && last[1] === differs) last[0] += word;
      else pieces.push([word, differs]);
    }
    return pieces.flatMap(([text, differs]) => {
      const words = text.trimEnd();
      return differs && words ? [make("mark", {}, words), text.slice(words.length)] : [text];
    });
  }

  function browse(place, { sides, prompts, judged }, chosen) {
    place.hidden = false;
    const state = { query: "", order: "drawn", best: false, marks: true, left: 0, right: Math.max(1, sides.indexOf(chosen)), at: 0, found: [] };
    if (sides.length < 2) state.right = 0;
    const several = sides.length > 2;
    const score = (one, side) => mean(one.sides[side].map(worth).filter((value) => value !== null));
    const gap = (one) => (score(one, state.right) ?? 0) - (score(one, state.left) ?? 0);

    const search = make("input", { type: "search", input: () => update({ query: search.value }) });
    const [orderLabel] = choice("Order of prompts", [["drawn", "as drawn"], ["gain", "largest gain first"], ["loss", "largest loss first"], ["high", "highest score first"], ["low", "lowest score first"]], "drawn", (order) => update({ order }));
    const names = sides.map((name, i) => [String(i), name]);
    const [leftLabel] = choice("Left", names, String(state.left), (side) => update({ left: Number(side) }, true));
    const [rightLabel] = choice("Right", names, String(state.right), (side) => update({ right: Number(side) }, true));
    const check = (label, on, change) => {
      const box = make("input", { type: "checkbox", checked: on, change: () => change(box.checked) });
      return make("label", { class: "check" }, box, label);
    };
    const step = (by, label, sign) => make("button", { type: "button", "aria-label": label, click: () => go(state.at + by) }, sign);
    const [previous, next] = [step(-1, "Previous prompt", "‹"), step(1, "Next prompt", "›")];
    const [promptLabel, promptSelect] = choice("Prompt", [], "", (at) => go(Number(at)));
    const count = make("output", {});
    const view = make("div", { class: "view" });
    place.append(
      make(
        "div",
        { class: "controls" },
        labelled("Search prompts and samples", search),
        ...(judged ? [orderLabel] : []),
        ...(several ? [leftLabel, rightLabel] : []),
        ...(judged ? [check("best first", false, (best) => update({ best }, true))] : []),
        check("mark differences", true, (marks) => update({ marks }, true)),
      ),
      make("div", { class: "controls prompts" }, promptLabel, make("div", { class: "buttons" }, previous, next), count),
      view,
    );

    function update(change, stay = false) {
      const open = state.found[state.at];
      Object.assign(state, change);
      const wanted = state.query.toLowerCase();
      const says = (one) => one.prompt.toLowerCase().includes(wanted) || [state.left, state.right].some((side) => one.sides[side].some(({ text }) => text.toLowerCase().includes(wanted)));
      state.found = prompts.filter((one) => !wanted || says(one));
      const by = { gain: (one) => -gap(one), loss: gap, high: (one) => -(score(one, state.right) ?? -Infinity), low: (one) => score(one, state.right) ?? Infinity }[state.order];
      if (by) state.found.sort((a, b) => by(a) - by(b));
      promptSelect.replaceChildren(...state.found.map((one, i) => make("option", { value: i }, `${i + 1}. ${short(one.prompt.trim().replace(/\s+/g, " "), 80)}`)));
      count.textContent = wanted ? `${state.found.length} of ${prompts.length} prompts` : "";
      go(stay ? Math.max(0, state.found.indexOf(open)) : 0);
    }

    function go(at) {
      state.at = Math.min(Math.max(at, 0), state.found.length - 1);
      [previous.disabled, next.disabled] = [state.at <= 0, state.at >= state.found.length - 1];
      promptSelect.value = String(state.at);
      render(state.found[state.at]);
    }

    function render(one) {
      if (!one) return view.replaceChildren(make("p", {}, "No prompt or sample has these words."));
      const columns = [state.left, state.right].map((side) => (state.best ? [...one.sides[side]].sort((a, b) => (worth(b) ?? -Infinity) - (worth(a) ?? -Infinity)) : one.sides[side]));
      const heads = [state.left, state.right].map((side) => {
        const average = score(one, side);
        return make("h3", {}, sides[side], ...(average == null ? [] : [make("span", { class: "score" }, ` mean ${digits(average)}`)]));
      });
      const rows = [];
      for (let i = 0; i < Math.max(columns[0].length, columns[1].length); i++) {
        const [a, b] = columns.map((column) => column[i]);
        const pieces = state.marks && a && b ? compare(a.text, b.text).map(marked) : [a, b].map((sample) => (sample ? [sample.text] : []));
        rows.push(card(a, pieces[0], sides[state.left]), card(b, pieces[1], sides[state.right]));
      }
      view.replaceChildren(make("div", { class: "prompt" }, one.prompt.trim()), make("div", { class: "pairs" }, ...heads, ...rows));
    }

    function card(sample, pieces, who) {
      if (!sample) return make("div", { class: "sample absent" });
      const facts = [
        sample.score == null ? "" : `score ${sample.score.toFixed(2)}${sample.surely == null ? "" : `, surely above ${sample.surely.toFixed(2)}`}`,
        sample.win == null ? "" : `wins by ${(100 * sample.win).toFixed(0)}%`,
        sample.tokens ? `${sample.tokens} tokens` : "",
        sample.truncated ? "cut at the limit" : "",
      ].filter(Boolean);
      return make(
        "div",
        { class: "sample" },
        make("div", { class: "text" }, ...(sample.text ? pieces : [make("i", {}, "(empty)")])),
        make("div", { class: "score" }, make("b", { class: "who" }, `${who} · `), facts.join(" · ")),
        ...(sample.reason ? [make("div", { class: "reason" }, make("b", {}, "Judge: "), sample.reason)] : []),
      );
    }

    update({});
    return (index) => {
      search.value = "";
      update({ query: "" });
      go(state.found.indexOf(prompts[index]));
      place.scrollIntoView({ block: "start" });
    };
  }

  const open = data.samples && byId("browser") ? browse(byId("browser"), data.samples, data.chosen) : null;
  if (byId("library"))
    charting()
      .then((Plotly) => {
        if (byId("frontier-chart")) frontier(Plotly, byId("frontier-chart"), data.frontier);
        if (byId("reliability-chart") && data.reliability.length) reliability(Plotly, byId("reliability-chart"), data.reliability);
        if (byId("prompts-chart") && open) prompts(Plotly, byId("prompts-chart"), data.samples, open);
        document.documentElement.classList.add("charted");
      })
      .catch((error) => {
        unfold(true); // the drawings stay
        console.error(error);
      });
})();
