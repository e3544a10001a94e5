/** What a click opens: the parts of a site, and one part with all that is known of it. */
const LISTED = 40;
let asked = 0;

/** The parts of a site under the section `home`: ranked by a column of a view, or by their mean; `chosen` or the first is opened. */
async function showSite(site, { view = null, column = null, chosen = null, home = "map" } = {}) {
  const mine = ++asked;
  const parts = await partsOf(site);
  if (mine !== asked) return; // another place was chosen meanwhile
  const about = DATA.sites[site];
  const ranked = parts.map((part) => ({ part, value: importanceIn(part, view, column) })).sort((a, b) => (b.value ?? -1) - (a.value ?? -1));
  const where = !view ? "averaged over all positions" : view.kind === "sequence" ? `at “${view.columns[column].trim() || "space"}”, position ${column} of ${view.label}` : view.kind === "role" ? `at ${view.columns[column]}` : `at ${view.columns[column]} ${view.label}, averaged over the shown sequences`;
  const list = html("ol", { class: "parts", "aria-label": `Subcomponents of ${about.name}` });
  const detail = html("div", { id: "part", "aria-live": "polite" });
  const fill = (count) => list.replaceChildren(...ranked.slice(0, count).map(({ part, value }) => html("li", {}, partButton(site, part, value, detail))));
  fill(LISTED);
  const more = ranked.length > LISTED ? html("button", { type: "button", onclick: () => { fill(ranked.length); more.remove(); } }, `all ${ranked.length}`) : null;
  const inactive = `${parts.length} of ${about.C} subcomponents are active on some token (importance above ${DATA.threshold})`;
  const heading = html("h3", { id: "panel-heading", tabindex: "-1" }, about.name);
  const note = about.silent ? html("p", { class: "note" }, `This site is silent: it ${about.silent}.`) : null;
  const lost = about.removed === null ? "" : ` Without the active ones, KL rises to ${number(about.removed)} nats.`;
  const panel = document.getElementById("panel");
  document.getElementById(home).append(panel);
  panel.replaceChildren(...[heading, note, html("p", {}, `${inactive}. Bars show importance ${where}.${lost}`), html("div", { class: "two" }, html("div", {}, list, more), detail)].filter(Boolean));
  const first = chosen === null ? ranked[0]?.part : parts.find((part) => part.subcomponent === chosen);
  if (first) showPart(site, first, detail);
}

function partButton(site, part, value, detail) {
  const label = `subcomponent ${part.subcomponent}, importance ${number(value)}`;
  const bar = html("span", { class: "bar" }, html("i"));
  bar.firstChild.style.width = `${100 * (value ?? 0)}%`;
  return html("button", { type: "button", "data-part": part.subcomponent, "aria-pressed": false, "aria-label": label, onclick: () => showPart(site, part, detail) }, html("span", {}, `#${part.subcomponent}`), bar, html("span", {}, number(value)));
}

function showPart(site, part, place) {
  document.querySelectorAll("#panel .parts button").forEach((button) => button.setAttribute("aria-pressed", Number(button.dataset.part) === part.subcomponent));
  const name = DATA.sites[site].name;
  history.replaceState(null, "", `#part=${encodeURIComponent(name)},${part.subcomponent}`);
  const rose = part.removed_masked - DATA.masked;
  const facts = [
    `|u| ${number(part.norm_u)}, |v| ${number(part.norm_v)}; importance at most ${number(part.highest)}, ${number(part.mean)} on average.`,
    `Taken out of the target (all other subcomponents on): KL ${number(part.removed)} nats. Taken out of the masked model: KL ${number(part.removed_masked)} nats, ${rose < 0 ? "" : "+"}${number(rose)}.`,
  ];
  const ends = [["reads tokens", part.reads], ["reads positions", part.positions], ["raises logits of", part.writes], ["lowers logits of", part.suppresses]].filter(([, entries]) => entries.length);
  place.replaceChildren(
    html("h3", {}, `${shortName(name)} #${part.subcomponent}`),
    ...facts.map((text) => html("p", {}, text)),
    ends.length ? html("div", { class: "ends" }, ...ends.map(([title, entries]) => html("div", {}, html("b", {}, title), html("ol", {}, ...entries.map(([what, value]) => html("li", {}, html("span", {}, what.trim() || "␣"), html("span", {}, number(value)))))))) : html("p", {}, "It reads no tokens or positions directly and writes no logits directly; see below where it is active."),
    ...byRole(part),
    ...strips(part),
    html("h3", {}, DATA.command ? "The same from a terminal, and from Python" : "The same from Python"),
    ...(DATA.command ? [html("code", { class: "block" }, `${DATA.command} --site ${quoted(name)} --subcomponent ${part.subcomponent}`)] : []),
    html("code", { class: "block" }, `paramlens.inspect_subcomponent(${DATA.opened}, ${JSON.stringify(name)}, ${part.subcomponent})`),
  );
}

const quoted = (word) => (/^[\w./:-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function byRole(part) {
  if (DATA.roles.length < 2) return [];
  return [html("h3", {}, `Importance ${DATA.views[0].label}`), table(DATA.roles, [part.roles])];
}

function strips(part) {
  const title = html("h3", {}, "Where it is active");
  if (!part.importance) return [title, html("p", { class: "note" }, "Its token strips are left out to keep this page small; the command below shows them.")];
  const rows = () => part.importance.flatMap((row, i) => row.map((g, j) => [i + 1, j, DATA.tokens[i][j], g, part.inner[i][j]]));
  const columns = ["sequence", "position", "token", "importance", "inner activation"];
  const button = html("button", { type: "button", "data-save": "CSV", onclick: () => save(`part-${part.subcomponent}.csv`, csv(columns, rows()), "text/csv") }, "CSV");
  return [title, html("p", {}, "Tokens are shaded by importance, from 0 to 1; below each is its inner activation x · u."), ...part.importance.map((row, i) => html("div", { class: "strip", role: "img", "aria-label": `sequence ${i + 1}: ${summary(row, i)}` }, ...row.map((g, j) => token(part, i, j, g)))), html("div", { class: "controls tools" }, button), tableLater(columns, rows)];
}

function summary(row, i) {
  const active = row.flatMap((g, j) => (g > DATA.threshold ? [`${DATA.tokens[i][j].trim()} ${number(g)}`] : []));
  return active.length ? `active at ${active.slice(0, 12).join(", ")}` : "active nowhere";
}

function token(part, i, j, g) {
  const { fill, text } = shade(g);
  const inner = part.inner[i][j];
  const role = DATA.tokenRoles ? `, ${DATA.tokenRoles[i][j]}` : "";
  const span = html("span", { title: `position ${j}${role}: importance ${number(g)}, inner activation ${number(inner)}` }, DATA.tokens[i][j].trim() || "␣", html("small", {}, g > DATA.threshold ? number(inner, 2) : "·"));
  if (g > 0.005) Object.assign(span.style, { background: fill, color: text });
  return span;
}
