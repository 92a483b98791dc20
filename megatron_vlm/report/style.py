"""The style sheet of the report: system fonts, light and dark appearance, no outside address."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --surface: #ffffff; --ink: #16191d; --soft: #5d6673;
  --rule: #e2e5ea; --accent: #2f5fd0; --good: #17803d; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --paper: #111418; --surface: #1a1e24; --ink: #e8ebef; --soft: #98a2b0;
  --rule: #2c323b; --accent: #7ea6ff; --good: #56c97f; --bad: #ff7b6f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
header p { color: var(--soft); font-size: 16px; margin: 8px 0 0; max-width: 760px; overflow-wrap: anywhere; }
h2 { font-size: 13px; font-weight: 600; letter-spacing: .07em; text-transform: uppercase; color: var(--soft);
  margin: 40px 0 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(156px, 1fr)); gap: 12px; margin-top: 28px; }
.cards + .cards { margin-top: 12px; }
.card, .charts figure, .scroll, details, .sample, .plot { background: var(--surface); border: 1px solid var(--rule);
  border-radius: 10px; }
.card { padding: 14px 16px; }
.card .label { color: var(--soft); font-size: 13px; }
.card .value { font-size: 24px; white-space: nowrap; font-weight: 600; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: 13px; }
.passed .note { color: var(--good); }
.failed .note { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; }
.charts figure { margin: 0; padding: 12px 14px; }
.charts .wide { grid-column: 1 / -1; }
.charts figcaption { color: var(--soft); font-size: 13px; text-align: center; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); }
.axis { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.raw { fill: none; stroke: var(--accent); stroke-width: 1; opacity: .28; }
.smooth { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.second { fill: none; stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 2 3; }
.dot { fill: var(--surface); stroke: var(--good); stroke-width: 2; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 6px 0 18px; }
.smooth-key { background: var(--accent); }
.second-key { border: 2px solid var(--good); }
.mark { stroke: var(--soft); stroke-dasharray: 4 4; }
.mark-text { fill: var(--soft); font-size: 11px; paint-order: stroke; stroke: var(--surface); stroke-width: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 10px 18px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
th:not(:first-child), td:not(:first-child) { text-align: right; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(156px, 1fr)); gap: 12px; }
.sample { margin: 0; overflow: hidden; }
.sample img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.sample audio { display: block; width: 100%; }
.sample figcaption { padding: 10px 12px 12px; font-size: 13px; }
.question { color: var(--soft); }
.prediction { font-size: 15px; font-weight: 600; }
.prediction span { font-weight: 500; font-size: 13px; }
.right .prediction span { color: var(--good); }
.wrong .prediction span { color: var(--bad); }
.wrong { border-color: var(--bad); }
details { padding: 12px 18px; }
* + details { margin-top: 12px; }
.plot { padding: 8px; overflow: hidden; }
.plot .axis text { text-shadow: 0 0 3px var(--surface), 0 0 3px var(--surface) !important; }
ul { margin: 0; padding-left: 18px; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 12px 0 4px; }
.empty { color: var(--soft); }
@media (max-width: 720px) { .charts { grid-template-columns: 1fr; } main { padding: 24px 16px 48px; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
