"""Look of the report: one style sheet, light and dark by the reader's setting, no fonts or files from elsewhere."""

__all__ = ["CSS"]

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f4ef; --card: #ffffff; --ink: #1b2230; --muted: #68707f; --grid: #e2e0da; --line: #e4e1d9;
  --s1: #b06a12; --s2: #3b6ea8; --s3: #7d8794; --s4: #2e8b74; --s5: #8a5aa8; --s6: #b8455a;
  --good: #1f7a4d; --good-bg: #e5f3ea; --bad: #b3372f; --bad-bg: #fae7e4; --note-bg: #f1eee6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0c111b; --card: #141b28; --ink: #e8ebf2; --muted: #93a0b4; --grid: #263145; --line: #243044;
    --s1: #e6a545; --s2: #6da7e6; --s3: #94a0b2; --s4: #4fc3a1; --s5: #b98be0; --s6: #ec7f8e;
    --good: #62cf97; --good-bg: #12291f; --bad: #f18b80; --bad-bg: #341917; --note-bg: #1a2231;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 0 20px 64px; }
header { max-width: 1120px; margin: 0 auto; padding: 40px 20px 8px; }
.brand { font-size: 13px; letter-spacing: .14em; text-transform: uppercase; color: var(--s1); font-weight: 600; }
h1 { font-size: clamp(26px, 5vw, 38px); line-height: 1.15; margin: 6px 0 4px; letter-spacing: -.015em;
     overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 52px 0 6px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
p { margin: 6px 0 14px; max-width: 74ch; }
.lead, .quiet { color: var(--muted); }
.quiet { font-size: 14px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 24px;
           margin: 22px 0 0; }
dl.facts dt { font-size: 12px; color: var(--muted); }
dl.facts dd { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 16px;
        margin: 14px 0; }
.grid > .card { min-width: 0; }
.grid > .card:only-child { max-width: 620px; }
.stack { display: grid; gap: 16px; margin: 14px 0; }
.overall { font-size: 18px; margin: 0 0 14px; }
.headline { display: flex; flex-wrap: wrap; gap: 10px 44px; align-items: baseline; margin: 2px 0 14px; }
.big { font-size: clamp(34px, 7vw, 48px); font-weight: 650; letter-spacing: -.02em; line-height: 1.1;
       font-variant-numeric: tabular-nums; }
.big small { font-size: .42em; font-weight: 400; color: var(--muted); letter-spacing: 0; }
.headline .label { font-size: 13px; color: var(--muted); }
.headline .second { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
ul.verdict { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
ul.verdict li { display: grid; grid-template-columns: 6.4em 1fr; gap: 12px; padding: 9px 14px; border-radius: 8px;
                align-items: baseline; }
ul.verdict li.yes { background: var(--good-bg); } ul.verdict li.no { background: var(--bad-bg); }
ul.verdict li.note { background: var(--note-bg); }
ul.verdict b { font-size: 13px; white-space: nowrap; }
ul.verdict + .card { margin-top: 14px; }
li.yes b { color: var(--good); } li.no b { color: var(--bad); } li.note b { color: var(--muted); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); font-size: 13px; padding: 6px 10px;
     border-bottom: 1px solid var(--line); white-space: nowrap; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th.left, td.left { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
tr.group td { font-weight: 600; padding-top: 14px; border-bottom: 0; }
tr.head td { font-weight: 650; }
td .se { color: var(--muted); font-weight: 400; }
tr:last-child td { border-bottom: 0; }
svg.dot { width: 160px; height: 18px; display: block; }
svg.chart { width: 100%; height: auto; display: block; font-family: inherit; }
svg.chart text { font-family: inherit; }
img { max-width: 100%; height: auto; display: block; }
img.sheet { width: 100%; border-radius: 8px; background: #000; }
.sky { background: #000; border-radius: 12px; padding: 10px; }
.card .sky { margin-bottom: 12px; }
.row { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 6px; margin-bottom: 8px; }
.row figure { margin: 0; position: relative; }
.row img { width: 100%; border-radius: 6px; background: #000; }
.row figure.query { outline: 2px solid var(--s1); outline-offset: 1px; border-radius: 6px; }
.row figcaption { position: absolute; left: 4px; bottom: 3px; font-size: 11px; line-height: 1.2; color: #fff;
                  text-shadow: 0 0 3px #000, 0 0 2px #000; font-variant-numeric: tabular-nums; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--muted); font-size: 14px; }
details .scroll { margin-top: 10px; max-height: 460px; overflow: auto; }
code, td.code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 6px 0; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td.code { text-align: left; white-space: normal; overflow-wrap: anywhere; }
footer { max-width: 1120px; margin: 0 auto; padding: 0 20px 40px; color: var(--muted); font-size: 13px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  .card { padding: 14px; border-radius: 10px; }
  h2 { margin-top: 40px; }
  .row { gap: 4px; }
  .row.neighbours figure:nth-child(n+7) { display: none; }
  .row.neighbours { --n: 6 !important; }
  .row figcaption { font-size: 9.5px; left: 3px; }
  th.dot, td.dot { display: none; }
  td, th { padding: 6px 7px; }
  ul.verdict li { grid-template-columns: 1fr; gap: 0; }
}
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
