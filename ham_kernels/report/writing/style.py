"""The page's frame and its style sheet: one column, readable on a phone, on paper, in light and dark."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --muted: #5b6570; --page: #ffffff; --line: #d5dae0; --box: #f4f6f8;
  --good: #00664a; --bad: #a83c00; --link: #0059a0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --muted: #a3adb8; --page: #15181c; --line: #39414a;
  --box: #1e2329; --good: #4fd0a4; --bad: #ff9d5c; --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
a { color: var(--link); }
p.muted, figcaption, caption, small { color: var(--muted); }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; caption-side: top; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere;
  min-width: 6rem; }
th.span { text-align: center; }
figure { margin: 1rem 0; padding: .75rem; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: #5b6570; font-size: .85rem; margin-top: .5rem; }
.box { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; margin: 1rem 0; }
.holds { color: var(--good); font-weight: 600; }
.fails { color: var(--bad); font-weight: 600; }
code { font-size: .85em; overflow-wrap: anywhere; }
details { margin: .75rem 0; }
pre { overflow-x: auto; font-size: .8rem; background: var(--box); padding: .75rem; border-radius: 6px; }
@media print { main { max-width: none; padding: 0; } body { font-size: 11pt; } figure, tr, .box { break-inside: avoid; }
  .wide { overflow: visible; } th, td { white-space: normal; padding: .15rem .3rem; font-size: 8pt; } }
"""
