"""What the pages of this room are made of: one HTML file that opens from disk, no network, no file beside it."""

from collections.abc import Iterable
from html import escape


def page(title: str, body: Iterable[str]) -> str:
    """These pieces of HTML under a title."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p class=eyebrow>robofactory evaluation</p><h1>{escape(title)}</h1></header>"
        f"{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16191f;--soft:#626a78;--line:#e1e5eb;--ok:#15915b;
--bad:#cf4436;--crash:#8a5cd6;--other:#5b7fb8;--accent:#2f6bdf;--val:#d9822b}
@media(prefers-color-scheme:dark){:root{--page:#101318;--card:#191d24;--ink:#e8ebf0;--soft:#98a1b0;--line:#2b313b;
--ok:#36b97f;--bad:#e8695c;--crash:#a983ea;--other:#7d9fd6;--accent:#6d9cf5;--val:#eba055}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif}main{max-width:1180px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:clamp(24px,4vw,36px);line-height:1.15;margin:0 0 24px;letter-spacing:-.02em}
h2{font-size:22px;margin:56px 0 12px;letter-spacing:-.01em}h3{font-size:15px;margin:26px 0 10px}
a{color:inherit;text-decoration-color:var(--line);text-underline-offset:3px}
.eyebrow{margin:0 0 4px;color:var(--accent);font-weight:600}
.muted,.note{color:var(--soft);margin:4px 0;font-size:13.5px}
.note{max-width:75ch;margin-top:14px}.warn{color:var(--bad);font-size:13px}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr))}
.card,.plot,.videos figure,.scroll,details{background:var(--card);border:1px solid var(--line);border-radius:12px}
.card{padding:18px 20px}.card h3{margin:0;min-height:3em}
.big{font-size:60px;font-weight:700;line-height:1.15;letter-spacing:-.04em}
.big small{font-size:26px;margin-left:3px;color:var(--soft)}
.bar{position:relative;height:12px;background:var(--line);border-radius:6px;margin:10px 0 14px}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:6px;background:var(--ok)}
.bar b{position:absolute;top:-4px;bottom:-4px;border:2px solid var(--ink);border-width:0 2px;opacity:.75;min-width:4px}
.bar b:after{content:"";position:absolute;left:0;right:0;top:calc(50% - 1px);border-top:2px solid var(--ink)}
.bar.other{height:6px}.bar.other i{background:var(--other)}.bar.other b{opacity:.45}
dl{display:grid;grid-template-columns:1fr 1fr;gap:8px 16px;margin:16px 0 0}dt{color:var(--soft);font-size:13px}
dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.strip{display:flex;flex-wrap:wrap;gap:4px}.strip i{width:16px;height:16px;border-radius:4px;background:var(--bad)}
.strip .success{background:var(--ok)}.strip .crash,.strip .timeout{background:var(--crash)}
.why{list-style:none;padding:0;max-width:720px}.why li{display:grid;grid-template-columns:minmax(150px,1.4fr) 2fr 32px;
gap:12px;align-items:center;margin:5px 0;font-size:14px}.why i{height:10px;border-radius:5px;background:var(--bad)}
.plots,.videos{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(270px,100%),1fr))}
.videos{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
figure{margin:0;overflow:hidden}.plot{padding:12px 10px 4px}
.plot figcaption{font-size:13.5px;font-weight:600;padding:0 6px 6px}
.legend{font-size:12.5px;margin-left:8px;color:var(--accent)}.legend .val{color:var(--val);margin-left:6px}
video{display:block;width:100%;background:#18191f}.videos figcaption{padding:10px 12px;font-size:13.5px}
svg{display:block;width:100%;height:auto;font-size:11px;fill:var(--soft)}.grid{stroke:var(--line);fill:none}
polyline{fill:none;stroke-width:1.8;stroke:var(--accent)}polyline.val{stroke:var(--val)}circle.val{fill:var(--val)}
.scroll{overflow:auto;max-height:520px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:6px 12px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{position:sticky;top:0;background:var(--card);z-index:1}tr:last-child td{border-bottom:0}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button:after{content:" ↑"}th[aria-sort=descending] button:after{content:" ↓"}
.plain th{font-weight:600;width:1%}.plain td{white-space:normal;overflow-wrap:anywhere}
.chip{font-size:12px;font-weight:600;padding:1px 8px;border-radius:9px;color:#fff;background:var(--bad)}
.chip.success{background:var(--ok)}.chip.crash,.chip.timeout{background:var(--crash)}
.forest text{font-size:12px}.forest .baseline{stroke:var(--ok);stroke-dasharray:4 3}
.forest .interval{stroke:var(--soft);stroke-width:2}.forest .rate{fill:var(--accent)}.stages{width:auto}
.checkpoints .joined,.checkpoints .interval{fill:none;stroke-width:2}.checkpoints .interval{opacity:.55}
.checkpoints td{white-space:normal}.checkpoints td:last-child{min-width:20em}
.parts{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 6px 10px;font-size:12.5px;color:var(--soft)}
.parts b{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
h4{font-size:14px;margin:22px 0 8px}.looks .card{margin-bottom:14px}.looks .card h3{min-height:0}
.looks figcaption{font-size:12.5px;color:var(--soft);padding:2px 0}
.shares{display:grid;gap:18px;grid-template-columns:minmax(0,7fr) minmax(0,5fr)}.shares .moment{stroke:var(--card);stroke-width:1.5}
div.moment{display:grid;gap:4px 20px;grid-template-columns:minmax(0,9fr) minmax(0,11fr);margin-top:14px;
border-top:1px solid var(--line);padding-top:10px}.moment>b{grid-column:1/-1;font-size:13px}
.seen{display:grid;gap:8px;grid-template-columns:repeat(auto-fit,minmax(110px,1fr));align-content:start}
.seen img{display:block;width:100%;border-radius:6px}svg.bins .axis{stroke:var(--line)}
svg.bins path.bins{stroke:var(--accent);stroke-width:1.3;opacity:.5}svg.bins .chosen{stroke:var(--bad);stroke-width:1.5}
svg.bins .number{fill:var(--ink)}
@media(max-width:760px){.shares,div.moment{grid-template-columns:minmax(0,1fr)}}
details{margin-top:18px;padding:12px 16px}summary{cursor:pointer;font-weight:600}
details .scroll{margin-top:12px;border:0}
pre{overflow:auto;font-size:12px;line-height:1.45;color:var(--soft)}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener('click', () => {
    const way = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
    const value = row => row.cells[column].dataset.v;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      return x !== '' && y !== '' && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
    };
    body.append(...[...body.rows].sort((a, b) => way * compare(a, b)));
  }));
}
"""
