"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const KV_PX = 210, LABEL_PX = 62, HEAD_PX = 34, MIN_BOX_PX = 1.2, NO_STATE = { zoom: 1, x: 0, y: 0 };
  // Dark blue to yellow over grey-green: lightness rises evenly, and red and green carry nothing alone.
  const SCALE = [[27, 38, 99], [66, 91, 130], [120, 140, 132], [186, 183, 104], [250, 226, 70]];

  // ---- the tree ----

  let data, nodes, byId, root, levels, ranks, least, most, hasClusters, isRebase, showsRebase;
  function read(given) {
    data = given; nodes = data.nodes; byId = new Map(nodes.map((node) => [node.id, node]));
    root = { id: 0, children: [], depth: 0, x: 0, w: 0 };
    for (const node of nodes) node.children = [];
    for (const node of nodes) (byId.get(node.parent) || root).children.push(node);
    levels = [];
    for (let row = root.children; row.length; row = row.flatMap((node) => node.children)) levels.push(row);
    ranks = new Map();
    data.answers.forEach((answer, i) => { if (answer.node !== null && i < 9) ranks.set(answer.node, i + 1); });
    const scores = nodes.map((node) => node.score).filter((score) => score !== null);
    const isUnit = scores.every((score) => score >= 0 && score <= 1);
    least = isUnit ? 0 : scores.reduce((a, b) => Math.min(a, b));
    most = isUnit ? 1 : scores.reduce((a, b) => Math.max(a, b));
    hasClusters = nodes.some((node) => node.cluster !== null);
    isRebase = data.figures.algorithm === "rebase";
    showsRebase = !isRebase && data.levels.some((l) => l.rebase_tokens !== null);
  }
  read(JSON.parse(document.getElementById("data").textContent));
  const parentOf = (node) => byId.get(node.parent) || null;

  function pathOf(node) {
    const path = [];
    for (let at = node; at; at = parentOf(at)) path.unshift(at);
    return path;
  }

  // Boxes in units of tokens. Each level keeps the order of its parents and is as narrow as it can be: families (children
  // of one parent) are wanted under their parent and pushed apart where they would overlap (isotonic regression).
  let extent = 1, gap = 1;
  function layOut(showsPruned) {
    const shown = levels.map((row) => row.filter((node) => showsPruned || node.state !== "pruned"));
    const tokens = nodes.reduce((sum, node) => sum + node.tokens, 0);
    gap = Math.max(1, (0.12 * tokens) / Math.max(1, nodes.length));
    for (const node of nodes) { node.w = Math.max(1, node.tokens); node.shown = false; }
    extent = Math.max(1, ...shown.map((row) => row.reduce((sum, node) => sum + node.w + 2 * gap, 0)));
    root.x = 0; root.w = extent;
    for (const row of shown) placeRow(row);
    return shown;
  }
  function placeRow(row) {
    const families = [];
    for (const node of row) {
      node.shown = true;
      const last = families[families.length - 1];
      if (last && last.parent === node.parent) last.nodes.push(node);
      else families.push({ parent: node.parent, nodes: [node] });
    }
    const blocks = [];
    let offset = 0;
    for (const family of families) {
      const width = family.nodes.reduce((sum, node) => sum + node.w + gap, gap);
      const parent = byId.get(family.parent) || root;
      blocks.push({ sum: parent.x + (parent.w - width) / 2 - offset, count: 1, families: [family] });
      family.offset = offset;
      offset += width;
      for (let n = blocks.length; n > 1 && blocks[n - 2].sum / blocks[n - 2].count > blocks[n - 1].sum / blocks[n - 1].count; n--) {
        const [a, b] = blocks.splice(n - 2, 2);
        blocks.push({ sum: a.sum + b.sum, count: a.count + b.count, families: [...a.families, ...b.families] });
      }
    }
    for (const block of blocks) {
      const start = Math.min(Math.max(0, block.sum / block.count), extent - offset);
      for (const family of block.families) {
        let x = start + family.offset + gap;
        for (const node of family.nodes) { node.x = x; x += node.w + gap; }
      }
    }
  }

  // ---- drawing ----

  const base = $("base"), over = $("over"), plot = $("plot");
  let rows = layOut(true), size = { w: 1, h: 1 }, view = { ...NO_STATE }, theme = {}, selected = null, hovered = null, queued = false;
  const pitch = () => Math.min(92, Math.max(34, (size.h - HEAD_PX) / (levels.length + 0.6)));
  const boxHeight = () => Math.min(40, Math.max(14, pitch() * 0.5));
  const treePx = () => Math.max(80, size.w - KV_PX - LABEL_PX);
  const unit = () => (treePx() / extent) * view.zoom;
  const top = (depth) => HEAD_PX + (depth - 1) * pitch() + pitch() * 0.42 + view.y;
  const box = (node) => ({ x: LABEL_PX + (node.x - view.x) * unit(), y: top(node.depth), w: Math.max(MIN_BOX_PX, node.w * unit()), h: boxHeight() });

  function colour(score) {
    if (score === null) return theme.none;
    const at = (most > least ? (score - least) / (most - least) : 0.5) * (SCALE.length - 1);
    const i = Math.min(SCALE.length - 2, Math.floor(at));
    return `rgb(${SCALE[i].map((low, k) => Math.round(low + (SCALE[i + 1][k] - low) * (at - i))).join(",")})`;
  }
  const inkOn = (score) => (score !== null && (score - least) / (most - least || 1) < 0.45 ? "#fff" : "#111");
  const number = (value) => (value === null || value === undefined ? "-" : Math.abs(value) < 0.0005 && value !== 0 ? value.toExponential(1) : value.toFixed(3));
  const line = (text) => text.replace(/\s+/g, " ").trim();

  function prepare(canvas) {
    const dpr = window.devicePixelRatio || 1, ctx = canvas.getContext("2d");
    canvas.width = Math.round(size.w * dpr); canvas.height = Math.round(size.h * dpr);
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    ctx.clearRect(0, 0, size.w, size.h);
    return ctx;
  }
  function clipTree(ctx) {
    ctx.save(); ctx.beginPath(); ctx.rect(LABEL_PX, 0, treePx() + 1, size.h); ctx.clip();
  }
  function edge(ctx, node) {
    const to = box(node), parent = parentOf(node);
    const from = parent ? box(parent) : { x: LABEL_PX + (root.w / 2 - view.x) * unit(), y: HEAD_PX + view.y - 8, w: 0, h: 0 };
    const x0 = from.x + from.w / 2, y0 = from.y + from.h, x1 = to.x + to.w / 2, mid = (y0 + to.y) / 2;
    ctx.moveTo(x0, y0); ctx.bezierCurveTo(x0, mid, x1, mid, x1, to.y);
  }
  function drawBase() {
    const ctx = prepare(base);
    clipTree(ctx);
    for (const faded of [true, false]) {
      ctx.beginPath();
      for (const row of rows) for (const node of row) if ((node.state === "pruned") === faded) edge(ctx, node);
      ctx.globalAlpha = faded ? 0.25 : 0.8; ctx.strokeStyle = theme.edge; ctx.lineWidth = 1; ctx.stroke();
    }
    for (const row of rows) for (const node of row) drawNode(ctx, node);
    ctx.restore();
    drawLevels(ctx);
    plot.dataset.drawn = String(rows.reduce((sum, row) => sum + row.length, 0));
  }
  function drawNode(ctx, node) {
    const b = box(node);
    if (b.x > size.w || b.x + b.w < 0) return;
    ctx.globalAlpha = node.state === "pruned" ? 0.3 : 1;
    if (node.state !== "failed") { ctx.fillStyle = colour(node.score); ctx.fillRect(b.x, b.y, b.w, b.h); }
    if (b.w > 3) {
      const isEnd = node.state === "complete";
      ctx.strokeStyle = isEnd ? theme.fg : theme.edge; ctx.lineWidth = isEnd ? 2 : 1;
      ctx.setLineDash(node.state === "failed" || node.state === "open" ? [3, 2] : []);
      ctx.strokeRect(b.x + 0.5, b.y + 0.5, b.w - 1, b.h - 1); ctx.setLineDash([]);
    }
    if (node.state === "failed") { ctx.beginPath(); ctx.moveTo(b.x, b.y); ctx.lineTo(b.x + b.w, b.y + b.h); ctx.moveTo(b.x + b.w, b.y); ctx.lineTo(b.x, b.y + b.h); ctx.stroke(); }
    if (b.w > 24) drawWords(ctx, node, b);
    if (b.w > 13 && node.cluster !== null) { ctx.fillStyle = theme.soft; ctx.font = "9px system-ui"; ctx.textAlign = "right"; ctx.fillText(`c${node.cluster}`, b.x + b.w, b.y - 3); }
    ctx.globalAlpha = 1;
    if (ranks.has(node.id) && b.w > 7) { ctx.fillStyle = theme.fg; ctx.font = "700 11px system-ui"; ctx.textAlign = "center"; ctx.fillText(`#${ranks.get(node.id)}`, b.x + b.w / 2, b.y + b.h + 12); }
  }
  function drawWords(ctx, node, b) {
    ctx.save(); ctx.beginPath(); ctx.rect(b.x, b.y, b.w, b.h); ctx.clip();
    ctx.fillStyle = node.score === null || node.state === "failed" ? theme.fg : inkOn(node.score);
    if (node.state === "pruned") ctx.fillStyle = theme.fg;
    if (node.state === "pruned") ctx.globalAlpha = 0.75;
    ctx.font = "11px system-ui"; ctx.textAlign = "left";
    const twoLines = b.h >= 28, low = b.y + b.h - (twoLines ? 5 : b.h / 2 - 4);
    if (twoLines) ctx.fillText(line(node.text).slice(0, Math.ceil(b.w / 4)), b.x + 4, b.y + 13);
    if (node.score !== null) ctx.fillText(node.score.toFixed(2), b.x + 4, low);
    ctx.restore();
  }
  // Label on the left, KV bars on the right; both stay where they are when the tree is moved sideways.
  function drawLevels(ctx) {
    const left = LABEL_PX + treePx() + 14, room = KV_PX - 76, half = boxHeight() / 2;
    const known = data.levels.flatMap((l) => [l.held_tokens, l.retained_tokens, l.rebase_tokens, l.measured_held_tokens]);
    const scale = room / Math.max(1, data.kv_scale_tokens, ...known.map((value) => value || 0));
    ctx.textAlign = "left"; ctx.font = "11px system-ui"; ctx.fillStyle = theme.soft;
    ctx.fillText("level", 14, 18); ctx.fillText("KV tokens held", left, 18);
    ctx.textAlign = "center"; ctx.fillText(`prompt, ${data.prompt_tokens} tokens`, LABEL_PX + treePx() / 2, 18);
    ctx.textAlign = "left";
    for (const l of data.levels) {
      const y = top(l.depth), held = l.held_tokens === null ? l.measured_held_tokens : l.held_tokens;
      ctx.fillStyle = theme.soft; ctx.fillText(`${l.depth}`, 14, y + half + 4); ctx.fillText(`${l.leaves}`, 34, y + half + 4);
      if (held === null) continue;
      ctx.fillStyle = theme.held; ctx.fillRect(left, y, held * scale, half - 1);
      ctx.fillStyle = theme.soft; ctx.fillText(`${held}`, left + held * scale + 5, y + half - 2);
      if (l.retained_tokens === null) continue;
      ctx.fillStyle = theme.kept; ctx.fillRect(left, y + half, l.retained_tokens * scale, half - 1);
      const right = Math.max(l.retained_tokens, l.rebase_tokens || 0) * scale;
      ctx.fillStyle = theme.soft; ctx.fillText(`${l.retained_tokens}`, left + right + 6, y + 2 * half - 2);
      if (l.rebase_tokens !== null && showsRebase) { ctx.fillStyle = theme.accent; ctx.fillRect(left + l.rebase_tokens * scale - 1.5, y + half - 2, 3, half + 2); }
    }
  }
  function drawOver() {
    const ctx = prepare(over), marked = hovered || selected;
    clipTree(ctx);
    if (marked && marked.cluster !== null) {
      ctx.strokeStyle = theme.accent; ctx.lineWidth = 1.5; ctx.setLineDash([3, 3]);
      for (const node of levels[marked.depth - 1]) if (node.shown && node.cluster === marked.cluster) { const b = box(node); ctx.strokeRect(b.x - 2, b.y - 2, b.w + 4, b.h + 4); }
      ctx.setLineDash([]);
    }
    for (const [end, width] of [[hovered, 1.5], [selected, 3]]) {
      if (!end || !end.shown) continue;
      ctx.strokeStyle = theme.accent; ctx.lineWidth = width; ctx.beginPath();
      const path = pathOf(end);
      for (const node of path) edge(ctx, node);
      ctx.stroke();
      for (const node of path) { const b = box(node); ctx.strokeRect(b.x - 1, b.y - 1, b.w + 2, b.h + 2); }
    }
    ctx.restore();
  }
  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; drawBase(); drawOver(); });
  }
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["fg", "soft", "line", "edge", "accent", "kept", "held", "none"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
    const ctx = $("scale").getContext("2d");
    for (let x = 0; x < 120; x++) { ctx.fillStyle = colour(least + ((most - least) * x) / 119); ctx.fillRect(x, 0, 1, 12); }
  }

  // ---- what is selected ----

  function add(parent, tag, text) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;  // never as HTML: the text is the model's
    parent.append(element);
    return element;
  }
  const facts = (node) => [["state", node.reason ? `${node.state}: ${node.reason}` : node.state], ["score", number(node.score)], ["tokens", node.tokens],
    ["cluster", node.cluster === null ? "-" : node.cluster], ["children", `${node.children.length} of ${node.allocation} allocated`], ["ended by", node.finish || "-"]];
  function select(node) {
    selected = node;
    if (node && !node.shown) { $("show-pruned").checked = true; rows = layOut(true); }
    plot.dataset.selected = node ? node.id : "";
    $("hint").hidden = Boolean(node);
    $("numbers").replaceChildren(); $("steps").replaceChildren();
    for (const button of $("answers").querySelectorAll("button")) button.setAttribute("aria-current", String(Boolean(node) && Number(button.dataset.node) === node.id));
    if (node) {
      const path = pathOf(node);
      const total = path.reduce((sum, step) => sum + step.tokens, 0);
      for (const [name, value] of [["step", `${node.id}, level ${node.depth}`], ...facts(node), ["trajectory", `${total} tokens`]]) { add($("numbers"), "dt", name); add($("numbers"), "dd", String(value)); }
      for (const step of path) {
        const item = add($("steps"), "li");
        add(item, "small", `level ${step.depth}, score ${number(step.score)}, ${step.tokens} tokens${step.cluster === null ? "" : `, cluster ${step.cluster}`}`);
        add(item, "pre", step.text);
      }
      reveal(node);
    }
    history.replaceState(null, "", node ? `#node=${node.id}` : location.pathname + location.search);
    redraw();
  }
  function reveal(node) {
    const b = box(node), margin = 20;
    if (b.x < LABEL_PX) view.x -= (LABEL_PX + margin - b.x) / unit();
    if (b.x + b.w > LABEL_PX + treePx()) view.x += (b.x + b.w + margin - LABEL_PX - treePx()) / unit();
    if (b.y < HEAD_PX) view.y += HEAD_PX - b.y;
    if (b.y + b.h > size.h) view.y -= b.y + b.h + margin - size.h;
    keepInside();
  }

  // ---- hands ----

  function keepInside() {
    view.zoom = Math.min(400, Math.max(1, view.zoom));
    view.x = Math.min(Math.max(0, view.x), extent * (1 - 1 / view.zoom));
    view.y = Math.min(0, Math.max(view.y, size.h - HEAD_PX - (levels.length + 0.6) * pitch()));
  }
  function zoom(factor, px) {
    const at = view.x + (px - LABEL_PX) / unit();
    view.zoom = Math.min(400, Math.max(1, view.zoom * factor));
    view.x = at - (px - LABEL_PX) / unit();
    keepInside(); redraw();
  }
  function nodeAt(px, py) {
    if (px < LABEL_PX || px > LABEL_PX + treePx()) return null;
    const near = (node) => { const b = box(node); return px >= b.x - 1 && px <= b.x + b.w + 1 && py >= b.y && py <= b.y + b.h; };
    return rows.flatMap((row, i) => (Math.abs(py - top(i + 1) - boxHeight() / 2) <= boxHeight() / 2 ? row : [])).find(near) || null;
  }
  function point(event) { const r = plot.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; }
  function hover(node, event) {
    hovered = node;
    const tip = $("tip");
    tip.hidden = !node;
    if (node) {
      tip.replaceChildren();
      add(tip, "pre", node.text.trim() || "(no text)");
      add(tip, "small", facts(node).map(([name, value]) => `${name} ${value}`).join(", "));
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8))}px`;
    }
    requestAnimationFrame(drawOver);
  }
  let drag = null;
  plot.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, vx: view.x, vy: view.y, moved: false }; });
  window.addEventListener("pointerup", () => { setTimeout(() => { drag = null; }); });
  plot.addEventListener("pointermove", (event) => {
    if (drag && (drag.moved || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4)) {
      drag.moved = true;
      view.x = drag.vx - (event.clientX - drag.x) / unit(); view.y = drag.vy + event.clientY - drag.y;
      hover(null); keepInside(); redraw();
    } else hover(nodeAt(...point(event)), event);
  });
  plot.addEventListener("pointerleave", () => hover(null));
  plot.addEventListener("click", (event) => { if (!drag || !drag.moved) select(nodeAt(...point(event))); });
  plot.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY * 0.002), point(event)[0]); }, { passive: false });
  function neighbour(key) {
    if (!selected) return byId.get((data.answers.find((a) => a.node !== null) || {}).node) || (rows[0] || [])[0];
    const row = rows[selected.depth - 1], at = row.indexOf(selected), children = selected.children.filter((c) => c.shown);
    if (key === "ArrowLeft") return row[at - 1];
    if (key === "ArrowRight") return row[at + 1];
    return key === "ArrowUp" ? parentOf(selected) : children.find((c) => c.state !== "pruned") || children[0];
  }
  plot.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow")) { const node = neighbour(event.key); if (node) select(node); }
    else if (event.key === "Escape") select(null);
    else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.5 : 1 / 1.5, LABEL_PX + treePx() / 2);
    else if (event.key === "0") { view = { ...NO_STATE }; redraw(); }
    else return;
    event.preventDefault();
  });
  $("zoom-in").onclick = () => zoom(1.5, LABEL_PX + treePx() / 2);
  $("zoom-out").onclick = () => zoom(1 / 1.5, LABEL_PX + treePx() / 2);
  $("fit").onclick = () => { view = { ...NO_STATE }; redraw(); };
  $("show-pruned").onchange = (event) => { rows = layOut(event.target.checked); if (selected && !selected.shown) select(null); view = { ...NO_STATE }; redraw(); };

  // ---- the page around the tree ----

  function fill() {
    for (const id of ["answers", "levels", "warnings"]) $(id).replaceChildren();
    document.title = `${data.title}: search tree`;
    $("title").textContent = data.title;
    const f = data.figures, shown = [];
    if (f.algorithm) shown.push(`${f.algorithm}${f.width ? ` width ${f.width}` : ""}`);
    shown.push(`${levels.length} levels, ${nodes.length} steps, ${nodes.filter((n) => n.state === "pruned").length} pruned`);
    if (f.kv_tokens_peak) shown.push(`KV peak ${f.kv_tokens_peak} tokens`);
    const generated = nodes.reduce((sum, node) => sum + node.tokens, 0);
    if (f.tokens_computed) shown.push(`${f.tokens_computed} of ${generated} generated tokens computed`);
    if (f.seconds) shown.push(`${f.seconds.toFixed(1)} s`);
    if (f.finish_reason || data.note) shown.push(data.note || f.finish_reason);
    $("live").hidden = !data.is_live; $("live").textContent = "running";
    $("figures").textContent = shown.join(" · ");
    $("warnings").hidden = !data.warnings.length;
    for (const text of data.warnings) add($("warnings"), "li", `Warning: ${text}`);
    $("low").textContent = Number(least.toPrecision(3)); $("high").textContent = Number(most.toPrecision(3));
    $("cluster-key").hidden = !hasClusters;
    $("cluster-key").style.display = hasClusters ? "" : "none";
    $("rebase-key").style.display = showsRebase ? "" : "none";
    $("rebase-name").textContent = `after REBASE on the same leaves (T ${data.rebase_temperature})`;
    $("answers-title").textContent = data.answers.length ? "Answers, best first" : data.is_live ? "No complete trajectory yet" : "No complete trajectory";
    data.answers.forEach((answer, i) => {
      const button = add(add($("answers"), "li"), "button");
      button.type = "button"; button.disabled = answer.node === null;
      if (answer.node !== null) { button.dataset.node = answer.node; button.onclick = () => select(byId.get(answer.node)); }
      add(button, "span", `#${i + 1}`); add(button, "b", answer.answer); add(button, "span", number(answer.score));
      if (answer.votes !== null) add(button, "span", `${number(answer.votes)} votes`);
    });
    const columns = [["level", "depth"], ["leaves", "leaves"], ["pruned", "pruned"], ["generated", "generated_tokens"], ["held", "held_tokens"], ["retained", "retained_tokens"],
      ...(showsRebase ? [["REBASE", "rebase_tokens"]] : []), ["held, measured", "measured_held_tokens"], ["retained, measured", "measured_retained_tokens"]];
    const head = add(add($("levels"), "thead"), "tr"), body = add($("levels"), "tbody");
    for (const [name] of columns) add(head, "th", name);
    for (const level of data.levels) { const row = add(body, "tr"); for (const [, key] of columns) add(row, "td", level[key] === null ? "-" : String(level[key])); }
  }
  function resize() { size = { w: plot.clientWidth, h: plot.clientHeight }; keepInside(); redraw(); }
  function fromHash() {
    const match = /^#node=(\d+)$/.exec(location.hash);
    if (match && byId.has(Number(match[1]))) select(byId.get(Number(match[1])));
  }

  // ---- a search that still runs ----

  function update(given) {
    const kept = selected && selected.id;
    read(given); rows = layOut($("show-pruned").checked);
    selected = null; hover(null); readTheme(); fill(); keepInside();
    if (byId.has(kept)) select(byId.get(kept));
    plot.dataset.updates = String(Number(plot.dataset.updates || 0) + 1);
    redraw();
  }
  function follow() {
    const source = new EventSource(`${location.pathname}/events`);
    source.onmessage = (event) => { update(JSON.parse(event.data)); if (!data.is_live) source.close(); };
    source.onerror = () => { $("live").textContent = source.readyState === EventSource.CLOSED ? "the server does not know this search any more" : "connection lost, trying again"; };
  }

  readTheme(); fill();
  new ResizeObserver(resize).observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); redraw(); });
  window.addEventListener("hashchange", fromHash);
  size = { w: plot.clientWidth, h: plot.clientHeight };
  drawBase(); fromHash(); drawOver();
  if (data.is_live) follow();
  window.treePage = { boxOf: (id) => box(byId.get(id)), colourOf: (id) => colour(byId.get(id).score) };  // for tests
})();
