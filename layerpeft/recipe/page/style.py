"""The style sheet of a page: light and dark, as wide as the screen, readable at a phone's width."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf8; --card: #fff; --ink: #1d1f21; --soft: #5a6068; --rule: #dfe1e4;
  --first: #0b63a5; --second: #c04a00; --rest: #b9bfc6; --link: #0b63a5;
  --part0: #0b63a5; --part1: #c04a00; --part2: #2d8a57; --part3: #8a5aa8; --part4: #b98a00; --part5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2126; --ink: #e8e9eb; --soft: #a3abb5; --rule: #363b43;
  --first: #5aaef0; --second: #f2955a; --rest: #565d67; --link: #7cc0f5;
  --part0: #5aaef0; --part1: #f2955a; --part2: #6cc795; --part3: #c79ae0; --part4: #e0bd55; --part5: #9aa3af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
p { margin: .4rem 0; } a { color: var(--link); } .soft { color: var(--soft); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .6rem 0 1rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem; margin: 0 0 1rem;
  break-inside: avoid; }
.beside { margin-bottom: 1rem; }
@media (min-width: 60rem) { .beside { columns: 2; column-gap: 1rem; } }
figure { margin: .5rem 0; } svg { display: block; width: 100%; max-width: 31rem; height: auto; margin: 0 auto; }
svg text { font: 12.5px system-ui, sans-serif; fill: var(--soft); }
@media (min-width: 30rem) { svg text { font-size: 10px; } }
svg text.name { fill: var(--ink); }
.rule { stroke: var(--rule); fill: none; } polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.first { stroke: var(--first); } polyline.second { stroke: var(--second); }
.fill.first, .dot.first { fill: var(--first); } .fill.second, .dot.second { fill: var(--second); } .fill.rest { fill: var(--rest); }
.fill.edge { stroke: var(--rule); stroke-width: .5; }
.part0 { fill: var(--part0); } .part1 { fill: var(--part1); } .part2 { fill: var(--part2); } .part3 { fill: var(--part3); }
.part4 { fill: var(--part4); } .part5 { fill: var(--part5); }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: .3rem 0; padding: 0; font-size: .85rem; }
.keys svg { display: inline-block; width: .8rem; height: .8rem; margin: 0 .35rem 0 0; vertical-align: -.05rem; }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: .3rem 0; padding: 0; }
.numbers div { min-width: 8rem; }
.numbers dt { color: var(--soft); font-size: .85rem; } .numbers dd { margin: 0; font-size: 1.15rem; }
.scroll { overflow: auto; max-height: 32rem; } .scroll:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 3px solid var(--first); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td:last-child { white-space: normal; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; } tr.on td { font-weight: 600; }
pre { margin: .3rem 0; padding: .6rem; background: var(--back); border: 1px solid var(--rule); border-radius: .4rem; overflow: auto;
  max-height: 30rem; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.answers { display: grid; gap: .2rem .8rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 44rem) { .answers { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
h3 { font-size: .9rem; margin: .5rem 0 0; color: var(--soft); font-weight: 600; } summary { cursor: pointer; padding: .2rem 0; }
"""
