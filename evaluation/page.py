"""One HTML page of what evaluate.py measured. It needs no network and no server: open it from disk.

`document(title, body)` is the head and foot of this page and of those of applications/, with style
and script; dose_svg, figures_html and the *_html behind it are for these. `render(groups)`
writes, for each data set on which runs were evaluated, one dict of `groups`:
    data      what the data is: the section's heading
    tables    (title, note, header, rows of cells) each; a click on a column's name sorts by it
    rows      a dict a run: run, variant; l0, fvu: the frontier; density: how often latents fire
    features  in these dicts, if there are any: latents, the tokens that each raises and lowers, the
              classes that it detects, and the contexts in which it is most active
A value that is None or NaN shows as an en dash. All of the page stands in the HTML: the script only
sorts, filters, chooses a run and moves, so the page can be read without it.

Keys: Tab and Enter as everywhere; / goes to the filter, Escape leaves it, j and k open the next and
the previous latent and close the one they leave.
"""
import base64, functools, hashlib, html, math, unicodedata

VARIANTS = ("vanilla", "gated", "topk", "matryoshka", "ordered", "gba")
# Their colours, after Okabe and Ito, so that also the colour-blind can tell them apart.
COLOURS = ("#0072b2", "#d55e00", "#00885f", "#b8578d", "#333333", "#b07800")
DARK = ("#56b4e9", "#f0752a", "#1fbf8f", "#d98bb8", "#eeeeee", "#f0e442")
SHAPES = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6l6 10.5h-12z",
          "M0-7l5.5 7l-5.5 7l-5.5-7z", "M0 6l6-10.5h-12z", "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z")
DASHES = ("none", "7 3", "2 2", "9 3 2 3", "4 6", "1 5")     # tell runs of one colour apart
UP = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 60, 382, 30, 246       # of a plot, and of the frame in it

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1d20; --soft: #5a5f66; --line: #d5d8dc;
  --box: #f3f4f6; --link: #0b5cad; --hot: 230 159 0; LIGHT }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --fg: #e8e8e8; --soft: #a9b0b8;
  --line: #3a4048; --box: #20252b; --link: #7cc0ff; --hot: 150 88 0; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 .4em }
h1 { margin-top: 0 }
h2 { border-top: 2px solid var(--line); padding-top: 1em }
a { color: var(--link) }
p { margin: .4em 0; max-width: 48rem }
:focus-visible { outline: 2px solid var(--link); outline-offset: -2px }
.note, figcaption { color: var(--soft) }
.scroll { overflow-x: auto; max-width: 100%; position: relative }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: left }
td { white-space: pre }
thead th { background: var(--box); white-space: nowrap; vertical-align: bottom }
tbody th { position: sticky; left: 0; min-width: 9rem; background: var(--bg); font-weight: 500;
  overflow-wrap: anywhere }
td.n, th.n { text-align: right }
th button { all: unset; cursor: pointer; padding: .35em 0 }
th button:focus-visible { outline: 2px solid var(--link) }
th button::after { content: " ↕"; color: var(--soft) }
th[aria-sort=ascending] button::after { content: " ↑"; color: inherit }
th[aria-sort=descending] button::after { content: " ↓"; color: inherit }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; margin-top: 1.5rem }
figcaption { margin-top: .4rem }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; max-width: 31rem }
svg { display: block; width: 100%; font: 13px system-ui, sans-serif; fill: currentColor }
.run:hover path { stroke-width: 4 }
.run:hover text { font-weight: bold }
.controls { max-width: none }
.controls label { display: inline-block; margin: 0 1rem .5rem 0; max-width: 100% }
output { white-space: nowrap }
select, input { font: inherit; padding: .3em; max-width: 100%; color: inherit;
  background: var(--box); border: 1px solid var(--soft); border-radius: 4px }
[hidden] { display: none !important }
details { border-bottom: 1px solid var(--line); scroll-margin-top: .5rem;
  content-visibility: auto; contain-intrinsic-size: auto 2.6rem }
summary { padding: .5em .3em; cursor: pointer }
summary span { display: inline-block; min-width: 7.5em; padding-right: .6em; color: var(--soft) }
summary span:first-child { color: inherit; font-weight: 600 }
code { font: .9em/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; unicode-bidi: isolate }
pre { overflow-x: auto; font-size: .9em; line-height: 1.3 }
summary code, dd code { display: inline-block; max-width: 100%; padding: 0 .2em;
  border-radius: 3px; background: var(--box) }
dl, ol { margin: .3em .3em .8em; padding: 0; list-style: none }
nav ul { padding-left: 1.2em }
dt { float: left; color: var(--soft) }
dd { margin: 0 0 .3em 4.5em }
ol li { display: flex; margin: .4em 0 }
ol span { flex: 0 0 3.5em; color: var(--soft) }
ol code { min-width: 0 }
mark { color: inherit; border-radius: 2px; background: rgb(var(--hot) / var(--a)) }
mark.peak { display: inline-block; font-weight: bold; outline: 1.5px solid }
"""

SCRIPT = r"""
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// '49,088', '0.33 %', '31.9 ± 2.1' and '1e-05' are numbers; NaN if it is none.
function number(text) {
  const plain = text.replace("\u2212", "-").replace(/(\d),(?=\d{3})/g, "$1");
  return parseFloat(plain.replace(/^[<>~≈]\s*/, ""));
}

// Missing values are last, whichever way the others go.
function sort(button) {
  const head = button.parentNode, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  const keys = new Map([...body.rows].map(row => [row, row.cells[column].textContent.trim()]));
  const known = row => !["", "–"].includes(keys.get(row));
  const numeric = [...body.rows].filter(known).every(row => !isNaN(number(keys.get(row))));
  const compare = numeric ? (a, b) => number(a) - number(b)
                          : (a, b) => a.localeCompare(b, "en", { numeric: true });
  body.append(...[...body.rows].sort((a, b) => known(b) - known(a)
    || (known(a) ? sign * compare(keys.get(a), keys.get(b)) : 0)));
  for (const other of head.parentNode.cells) other.ariaSort = "none";
  head.ariaSort = sign > 0 ? "ascending" : "descending";
}
for (const button of all("th button")) button.onclick = () => sort(button);

// The list in use, and the latent in it where j and k go on from.
let list = document.querySelector(".features"), latent = null;
document.addEventListener("focusin", ({ target }) => {
  list = target.closest(".features") ?? list;
  latent = target.closest("details") ?? latent;
});

const texts = new WeakMap();          // of a latent's tokens and contexts, made when first searched
function text(details) {
  if (!texts.has(details))
    texts.set(details, all("code", details).map(e => e.textContent).join("\n").toLowerCase());
  return texts.get(details);
}

for (const box of all(".features")) {
  const [runs, filter, count] = all("select, input, output", box);
  const show = () => {
    const query = filter.value.toLowerCase();
    all("section", box).forEach((section, i) => {
      section.hidden = i !== runs.selectedIndex;
      if (section.hidden) return;
      const latents = all("details", section);
      for (const d of latents)
        d.hidden = !(d.dataset.n === query.trim() || text(d).includes(query));
      count.value = `${latents.filter(d => !d.hidden).length} of ${latents.length} latents`;
    });
    latent = null;
  };
  runs.onchange = filter.oninput = show;
  for (const control of all(".controls", box)) control.hidden = false;
  show();
}

function move(step) {
  const shown = all("details", list).filter(d => !d.closest("[hidden]"));
  const here = shown.indexOf(latent), next = shown[here < 0 ? 0 : here + step];
  if (!next) return;
  if (here >= 0) shown[here].open = false;
  next.open = true;
  next.firstElementChild.focus();
  next.scrollIntoView();
}

document.addEventListener("keydown", event => {
  if (!list || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select");
  if (event.key === "Escape" && typing) typing.blur();
  else if (typing) return;
  else if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/") { list.querySelector("input").focus(); event.preventDefault(); }
});
"""

# --- text -----------------------------------------------------------------------------------------

@functools.cache
def visible(text):
    """Any text as HTML that shows what it is and runs nothing: line ends and tabs as signs; other
    controls, what turns the direction of text and all else without a picture as its number."""
    if not text.isprintable():
        text = "".join(map(sign, text))
    return html.escape(text)

def sign(c):
    if c in "\n\t":
        return "↵" if c == "\n" else "⇥"
    kind = unicodedata.category(c)
    return f"‹{ord(c):02X}›" if kind[0] == "C" or kind in ("Zl", "Zp") else c

def known(value):
    return isinstance(value, (int, float)) and math.isfinite(value)

def number(value, form=".4g"):
    return format(value, form) if known(value) else "–"

def cell(value):
    return "–" if value is None or value != value else visible(str(value))

# --- plots ----------------------------------------------------------------------------------------

def look(rows):
    """For each row its colour and shape, which the variant decides, and dashes for its own line."""
    names, used, looks = list(dict.fromkeys((*VARIANTS, *(r["variant"] for r in rows)))), [], []
    for i in (names.index(r["variant"]) for r in rows):
        colour, shape = i % len(COLOURS), (i + i // len(COLOURS)) % len(SHAPES)
        dashes = DASHES[used.count(colour) % len(DASHES)]
        looks.append((f"color:var(--c{colour},{COLOURS[colour]})", SHAPES[shape], dashes))
        used.append(colour)
    return looks

def padded(values):
    """The ends of an axis for these values, with a little room, also around one alone."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.05 * abs(high)) or 1
    return low - room, high + room

def scale(low, high, start, end):
    return lambda v: round(start + (v - low) / (high - low) * (end - start), 1)

def ticks(low, high, log=False):
    """A few round numbers in [low, high]; 1, 2 and 5 times powers of ten on a log axis, if wide."""
    for digits in ((1, 2, 5), (1,)) if log else ():
        powers = [10.0 ** e for e in range(-9, 10)]
        found = [p * m for p in powers for m in digits if low <= p * m <= high]
        if 3 <= len(found) <= 8:
            return found
    step = 10.0 ** math.floor(math.log10((high - low) / 8))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

def plot(label, xname, yname, xticks, yticks, parts):
    """A frame with these ticks, pairs of place and text, and in it the parts: (style, picture, the
    picture's key, text), where keys and texts make the legend below."""
    grid = [f'<path d="M{LEFT} {y}H{RIGHT}"/>' for y, _ in yticks]
    grid += [f'<path d="M{x} {BOTTOM}v5"/>' for x, _ in xticks]
    texts = [f'<text x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end">{t}</text>' for y, t in yticks]
    texts += [f'<text x="{x}" y="{BOTTOM + 19}" text-anchor="middle">{t}</text>' for x, t in xticks]
    texts += [f'<text x="4" y="14">{yname}</text>',
              f'<text x="{RIGHT}" y="{BOTTOM + 40}" text-anchor="end">{xname}</text>']
    columns = max(1, min(3, int(WIDTH / (36 + 7.2 * max(len(part[3]) for part in parts)))))
    for i, (style, picture, key, text) in enumerate(parts):
        x, y = i % columns * WIDTH // columns, BOTTOM + 66 + 19 * (i // columns)
        text = text if len(text) <= 46 else "…" + text[-45:]      # the end of a path says most
        text = f'<text x="32" y="4" fill="var(--fg,#000)">{visible(text)}</text>'
        texts.append(f'<g class="run" style="{style}">{picture}'
                     f'<g transform="translate({x} {y})">{key}{text}</g></g>')
    height = BOTTOM + 56 + 19 * -(-len(parts) // columns)
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}"><g fill="none" '
            f'stroke="currentColor" stroke-opacity=".25">{"".join(grid)}</g>{"".join(texts)}</svg>')

def frontier_svg(rows):
    """FVU over L0: a mark a run; the runs of one variant share colour and shape, and a line."""
    pairs = [(r, mine) for r, mine in zip(rows, look(rows))
             if known(r.get("l0")) and known(r.get("fvu")) and r["l0"] > 0]
    if not pairs:
        return "<p>No run here has an L0 and an FVU.</p>"
    low, high = padded([math.log10(r["l0"]) for r, _ in pairs])
    bottom, top = padded([r["fvu"] for r, _ in pairs])
    x, y = scale(low, high, LEFT, RIGHT), scale(bottom, top, BOTTOM, TOP)
    parts = []
    for variant in dict.fromkeys(r["variant"] for r, _ in pairs):
        mine = sorted((p for p in pairs if p[0]["variant"] == variant), key=lambda p: p[0]["l0"])
        style, shape, _ = mine[0][1]
        spots = [(x(math.log10(r["l0"])), y(r["fvu"])) for r, _ in mine]
        line = " ".join(f"{a},{b}" for a, b in spots)
        mark = f'd="{shape}" fill="currentColor" stroke="var(--bg,#fff)"'
        marks = [f'<path class="mark" transform="translate({a} {b})" {mark}><title>'
                 f'{visible(r["run"])}: L0 {r["l0"]:.4g}, FVU {r["fvu"]:.4g}</title></path>'
                 for (a, b), (r, _) in zip(spots, mine)]
        parts.append((style, f'<polyline points="{line}" fill="none" stroke="currentColor"/>'
                      + "".join(marks), f'<path transform="translate(16 0)" {mark}/>', variant))
    levels = ticks(bottom, top)
    digits = max(len(f"{t:.9f}".rstrip("0").partition(".")[2]) for t in levels)
    return plot("FVU over L0, one mark a run; the table has the numbers",
                "L0: active latents a token (log scale)", "FVU",
                [(x(math.log10(t)), f"{t:,.6g}") for t in ticks(10 ** low, 10 ** high, log=True)],
                [(y(t), f"{t:.{digits}f}") for t in levels], parts)

def density_svg(rows):
    """How many latents fire how often: a step line a run. The legend counts the silent ones."""
    pairs = [(r, mine) for r, mine in zip(rows, look(rows))
             if isinstance(r.get("density"), dict)]
    if not pairs:
        return "<p>No run here has firing rates.</p>"
    edges = [e for r, _ in pairs for e in r["density"]["edges"]]
    share = lambda d: [100 * n / ((sum(d["count"]) + d["dead"]) or 1) for n in d["count"]]
    top = 1.08 * max(s for r, _ in pairs for s in share(r["density"])) or 1
    x, y = scale(min(edges), max(edges), LEFT, RIGHT), scale(0, top, BOTTOM, TOP)
    parts = []
    for r, (style, _, dashes) in pairs:
        d = r["density"]
        steps = "".join(f"V{y(s)}H{x(e)}" for s, e in zip(share(d), d["edges"][1:]))
        line = f'fill="none" stroke="currentColor" stroke-width="1.7" stroke-dasharray="{dashes}"'
        parts.append((style, f'<path class="line" d="M{x(d["edges"][0])} {BOTTOM}{steps}" {line}>'
                      f'<title>{visible(r["run"])}</title></path>', f'<path d="M2 0h26" {line}/>',
                      f'{r["run"]}, {d["dead"]:,} dead'))
    tens = [t for t in ticks(min(edges), max(edges)) if t == int(t)]
    return plot("Share of the latents over their firing rate, one line a run",
                "firing rate: share of tokens (log scale)", "% of the latents",
                [(x(t), "10" + f"{t:.0f}".translate(UP)) for t in tens],
                [(y(t), f"{t:.6g}") for t in ticks(0, top)], parts)

def dose_svg(label, xname, yname, lines, log=False):
    """{name: [(x, y, low, high), ...]} as lines with intervals, for at most six names; points whose
    numbers are not known are left out. log: x, which is above 0, on a log axis."""
    lines = {name: [p for p in points if all(map(known, p))] for name, points in lines.items()}
    points = [p for found in lines.values() for p in found]
    if not points:
        return "<p>Nothing here has been measured.</p>"
    at, back = (math.log10, lambda v: 10 ** v) if log else (float, float)
    (left, right), (bottom, top) = padded([at(p[0]) for p in points]), padded(
        [v for p in points for v in p[1:]])
    place, y, parts = scale(left, right, LEFT, RIGHT), scale(bottom, top, BOTTOM, TOP), []
    x = lambda v: place(at(v))
    for i, (name, found) in enumerate(lines.items()):
        mark = f'd="{SHAPES[i % len(SHAPES)]}" fill="currentColor" stroke="var(--bg,#fff)"'
        spots = " ".join(f"{x(p[0])},{y(p[1])}" for p in found)
        marks = [f'<path d="M{x(a)} {y(low)}V{y(high)}" stroke="currentColor"/><path class="mark" '
                 f'transform="translate({x(a)} {y(b)})" {mark}><title>{visible(name)}: {a:.3g}, '
                 f"{b:.4g} ({low:.4g} to {high:.4g})</title></path>" for a, b, low, high in found]
        colour = f"color:var(--c{i % len(COLOURS)},{COLOURS[i % len(COLOURS)]})"
        parts.append((colour, f'<polyline points="{spots}" fill="none" stroke="currentColor"/>'
                      + "".join(marks), f'<path transform="translate(16 0)" {mark}/>', name))
    across, up = ticks(back(left), back(right), log), ticks(bottom, top)
    return plot(visible(label), xname, yname, [(x(t), f"{t:.6g}") for t in across],
                [(y(t), f"{t:.6g}") for t in up], parts)

# --- the page -------------------------------------------------------------------------------------

def to_the_right(n, rows):
    """Of n columns: are the cells numbers, or empty? Of the first never."""
    number = lambda value: value is None or value != value or (
        str(value).lstrip("-−+<~")[:1] in "–0123456789")
    return [i > 0 and all(number(row[i]) for row in rows) for i in range(n)]

def table_html(title, note, header, rows):
    right = to_the_right(len(header), rows)
    rows = [[cell(value) for value in row] for row in rows]
    side = lambda i: ' class="n"' if right[i] else ""
    head = "".join(f'<th scope="col" aria-sort="none"{side(i)}><button type="button">{cell(name)}'
                   '</button></th>' for i, name in enumerate(header))
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(
        f"<td{side(i)}>{row[i]}</td>" for i in range(1, len(row))) + "</tr>\n" for row in rows)
    return (f'<h3>{cell(title)}</h3><p class="note">{cell(note)}</p>\n<div class="scroll" '
            f'role="region" tabindex="0" aria-label="{cell(title)}"><table><thead><tr>{head}</tr>'
            f"</thead><tbody>\n{body}</tbody></table></div>\n")

def context_html(context, peak):
    """A line: the value at the peak, then the tokens, in the strength of their activation."""
    parts = []
    for i, (token, value) in enumerate(zip(context["tokens"], context["values"])):
        strength = min(1, value / peak) if known(value) else 0
        spot = ' class="peak"' if i == context["at"] else ""
        parts.append(visible(token) if not strength and not spot else
                     f'<mark{spot} style="--a:{strength:.2f}" title="{number(value)}">'
                     f"{visible(token)}</mark>")
    return (f'<li><span>{number(context["values"][context["at"]])}</span><code>{"".join(parts)}'
            "</code></li>")

def latent_html(f):
    contexts = f.get("contexts") or []
    values = [v for c in contexts for v in c["values"] if known(v)]
    peak = max([f["peak"] if known(f.get("peak")) else 0, *values]) or 1
    code = lambda tokens: " ".join(f"<code>{visible(t)}</code>" for t in tokens) or "–"
    rate = number(100 * f["rate"], ".3g") if known(f.get("rate")) else "–"
    told = [(f"<code>{visible(f'{kind}={name}')}</code> ", f"(precision {p:.2f}, recall {r:.2f})")
            for kind, name, p, r in f.get("detects") or []]
    best = told[0][0] if told else ""
    told = f'<dt>detects</dt><dd>{", ".join(map("".join, told))}</dd>' if told else ""
    board = f'<pre>{html.escape(f["board"])}</pre>' if f.get("board") else ""      # of othello
    return (f'<details data-n="{f["latent"]}"><summary><span>latent {f["latent"]}</span> '
            f'<span>fires {rate} %</span> <span>peak {number(f.get("peak"))}</span> '
            f'{best}{code([c["tokens"][c["at"]] for c in contexts[:4]])}</summary>'
            f'<dl>{told}<dt>raises</dt><dd>{code(f.get("raises") or [])}</dd>'
            f'<dt>lowers</dt><dd>{code(f.get("lowers") or [])}</dd></dl>{board}'
            f'<ol>{"".join(context_html(c, peak) for c in contexts)}</ol></details>\n')

def features_html(rows):
    rows = [r for r in rows if r.get("features")]
    if not rows:
        return ""
    options = "".join(f'<option>{visible(r["run"])}</option>' for r in rows)
    runs = "".join(f'<section><h4>{visible(r["run"])}</h4>\n'
                   f'{"".join(map(latent_html, r["features"]))}</section>\n' for r in rows)
    return f"""<div class="features"><h3>Latents</h3>
<p class="note">How often each fires, its largest activation, what it detects best (with --probes,
on words and contexts of their own, not on those below; filter by role=argument or letter=s), the
tokens it peaks on. Inside: the next tokens that it raises
and lowers most, and its top contexts: activation at the peak, then the text, every token as strong
as its activation (the value shows on hover), the peak outlined.</p>
<p class="controls" hidden><label>Run <select autocomplete="off">{options}</select></label>
<label>Filter <input autocomplete="off" placeholder="number or text" spellcheck="false"></label>
<output></output></p>
<p class="note controls" hidden>Keys: <kbd>/</kbd> to the filter, <kbd>Escape</kbd> leaves it,
<kbd>j</kbd> and <kbd>k</kbd> open the next and the previous latent and close the one they leave,
<kbd>Tab</kbd> and <kbd>Enter</kbd> as everywhere.</p>
{runs}</div>"""

def group_html(i, group):
    rows = group["rows"]
    return (f'<section id="data{i}"><h2>{cell(group["data"])}</h2>\n'
            f'{"".join(table_html(*table) for table in group["tables"])}<div class="plots">'
            f"<figure>{frontier_svg(rows)}<figcaption>Error against sparsity: lower and further "
            f"left is better.</figcaption></figure>\n<figure>{density_svg(rows)}<figcaption>How "
            "often latents fire; dead ones never did.</figcaption></figure></div>\n"
            f"{features_html(rows)}</section>\n")

def figures_html(figures):
    """Pictures side by side: [(svg, caption), ...]."""
    return '<div class="plots">' + "\n".join(
        f"<figure>{svg}<figcaption>{cell(caption)}</figcaption></figure>"
        for svg, caption in figures) + "</div>\n"

def written_html(title, note, prompts):
    """What a model writes: [(tokens of the prompt, {name: [(token, marked), ...]}), ...]."""
    body = ""
    for i, (prompt, ways) in enumerate(prompts, 1):
        texts = {name: "".join(f'<mark style="--a:.6">{visible(t)}</mark>' if marked else visible(t)
                               for t, marked in tokens) for name, tokens in ways.items()}
        body += (f'<h4>Prompt {i}</h4><p><code>{"".join(map(visible, prompt))}</code></p><dl>'
                 + "".join(f"<dt>{cell(name)}</dt><dd><code>{text}</code></dd>\n"
                           for name, text in texts.items()) + "</dl>\n")
    return f'<h3>{cell(title)}</h3><p class="note">{cell(note)}</p>\n{body}'

def explained_html(found):
    """What explain.py found of latents: explanations with their figures, and every test; foldable.
    found: as in explanations.json."""
    body = ""
    for f in found:
        ways = "".join(f"<dt>{cell(name)}</dt><dd>r {number(w['r'], '.3f')}, AUC "
                       f"{number(w['auc'], '.3f')}, written {number(w['written'], '.2f')}: <code>"
                       f"{visible(w['program'])}</code></dd>\n" for name, w in f["ways"].items())
        rounds = "".join(f"<h4>Round {i}</h4>" + "".join(map(hypothesis_html, r["hypotheses"]))
                         + f"<p>Leading: <code>{visible(r['leading'])}</code></p>\n"
                         for i, r in enumerate(f["rounds"], 1))
        notes = "".join(f"<li>{cell(note)}</li>" for note in f.get("notes") or [])
        body += (f'<details data-n="{f["latent"]}"><summary><span>latent {f["latent"]}</span> '
                 f'<span>fires {number(100 * f["rate"], ".3g")} %</span> <span>r '
                 f'{number(f["ways"]["active"]["r"], ".3f")}</span> <code>'
                 f'{visible(f["ways"]["active"]["program"])}</code></summary><dl>{ways}</dl>'
                 f"{rounds}<h4>Notes</h4><ul>{notes or '<li>none</li>'}</ul></details>\n")
    return ('<h3>Tests</h3><p class="note">Of each latent its explanations, then every test: the '
            "latent's code at the last token of a text, ✓ if it fires or is silent as the "
            "hypothesis says, where the text comes from, the text.</p>\n<div>" + body + "</div>")

def hypothesis_html(h):
    tests = "".join(
        f'<li><span>{"✓" if t["says"] == t["fires"] else "✗"} {number(t["code"], ".3g")}</span>'
        f'<div>{cell(t["kind"])}; should {"fire" if t["says"] else "be silent"}: '
        f'<code>{visible(t["text"])}</code></div></li>' for t in h["tests"])
    return (f'<details><summary><span>{cell(h["verdict"])}</span> '
            f'{"a control: " if h["control"] else ""}<code>{visible(h["program"])}</code></summary>'
            f"<ol>{tests}</ol></details>\n")

def decided_html(pairs, names):
    """What decided pairs of reward.py; foldable. pairs: as in reward.json, with their texts; names:
    {latent: what it detects}."""
    text = lambda whole: "\n".join(map(visible, whole.split("\n")))
    body = ""
    for p in pairs:
        adds = "".join(f'<li><span>{number(v, "+.3f")}</span><div>latent {i} '
                       f"{cell(names.get(i) or '')}</div></li>" for i, v in p["latents"])
        texts = "".join(f"<dt>{name}</dt><dd><code>{text(p[name])}</code></dd>\n"
                        for name in ("prompt", "chosen", "rejected"))
        body += (f'<details><summary><span>line {p["line"]}</span> <span>'
                 f'{"✓" if p["margin"] > 0 else "✗"} {number(p["margin"], "+.3f")}</span> '
                 f"{cell(p.get('attribute') or '')}</summary><dl>{texts}</dl><ol>{adds}<li><span>"
                 f'{number(p["rest"], "+.3f")}</span><div>all others</div></li></ol></details>\n')
    return ('<h3>Held-out pairs</h3><p class="note">Of each its line in the file, its margin (✓ if '
            "the chosen answer has the larger reward), and inside what each latent adds to the "
            f"margin.</p>\n<div>{body}</div>\n")

def document(title, body):
    """A whole page as one string, around HTML in which every text is escaped; write it as UTF-8."""
    style = STYLE
    for word, colours in (("LIGHT", COLOURS), ("DARK", DARK)):
        style = style.replace(word, " ".join(f"--c{i}: {c};" for i, c in enumerate(colours)))
    # Only this very script may run, and nothing may be fetched, whatever the texts below hold.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "img-src data:; base-uri 'none'; form-action 'none'")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{cell(title)}</title><link rel="icon" href="data:,">
<style>{style}</style></head><body><main>
<h1>{cell(title)}</h1>
{body}</main>
<script>{SCRIPT}</script></body></html>
"""

def render(groups):
    """The page of evaluate.py as one string; write it as UTF-8."""
    links = "".join(f'<li><a href="#data{i}">{cell(group["data"])}</a></li>'
                    for i, group in enumerate(groups))
    return document("Six SAEs, evaluated", f'''<nav aria-label="Data sets"><ul>{links}</ul></nav>
{"".join(group_html(i, group) for i, group in enumerate(groups))}''')
