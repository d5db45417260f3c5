"""The look of report.html: one sheet, light and dark."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1f24;--muted:#667080;--line:#e3e4de;--band:#f1f1ec;--accent:#2c6fbb;
--rotate:#2f6fb7;--product:#c8553d;--plain:#3b9a78;--encode:#b8862b;--rescale:#7d5ba6;--refresh:#b03a74;--sum:#8a939e;--other:#a9a9a9;
--phase0:#2f6fb7;--phase1:#3b9a78;--phase2:#b8862b;--phase3:#7d5ba6;--phase4:#c8553d;--phase5:#8a939e;--danger:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1d2126;--ink:#e7e9ec;--muted:#98a2b0;--line:#2e343b;--band:#242a31;
--accent:#6aa9f0;--rotate:#5b9be0;--product:#e57b62;--plain:#5cc19c;--encode:#d9a94c;--rescale:#a585d0;--refresh:#dd6fa3;--sum:#7f8a97;
--other:#777;--phase0:#5b9be0;--phase1:#5cc19c;--phase2:#d9a94c;--phase3:#a585d0;--phase4:#e57b62;--phase5:#7f8a97;--danger:#c9372c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 80px}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:.1em 0 .4em}
h2{font-size:1.15rem;letter-spacing:-.01em;margin:0 0 .7em}
.kicker{color:var(--muted);font-size:.85rem;margin:0}
.lead{font-size:1.1rem;max-width:62ch;margin:.2em 0 1.3em}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:20px 0}
section>p{margin:.1em 0 1em;color:var(--muted)}section>p:last-child{margin:1em 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(176px,1fr));gap:14px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;display:flex;flex-direction:column}
.tile span,.tile em{color:var(--muted);font-size:.85rem;font-style:normal}
.tile strong{font-size:1.4rem;white-space:nowrap;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.danger{background:var(--danger);color:#fff;font-weight:600;border-radius:10px;padding:14px 18px;margin:14px 0}
blockquote{margin:0 0 1.1em;padding:12px 16px;border-left:3px solid var(--accent);background:var(--band);border-radius:0 8px 8px 0;
font-family:ui-serif,Georgia,serif;white-space:pre-wrap}
.caret{color:var(--accent)}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:var(--muted);font-weight:550;vertical-align:bottom}
th,td{padding:6px 10px;border-bottom:1px solid var(--line)}td{vertical-align:top}
tbody tr:last-child>td,tbody tr:last-child>th{border-bottom:0}
thead th{border-bottom:1px solid var(--muted)}
th.num{text-align:right}td.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.long{min-width:15em}
.facts th{width:220px;vertical-align:top}
.facts td{overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.88em}
pre{overflow:auto;background:var(--band);padding:14px;border-radius:8px;line-height:1.4}
details{margin-top:12px}summary{cursor:pointer;color:var(--accent)}
.scroll{overflow-x:auto}
.share{position:relative;min-width:110px;height:1.4em;background:var(--band);border-radius:4px;overflow:hidden}
.share i{position:absolute;inset:0 auto 0 0;background:var(--accent);opacity:.35}
.share span{position:relative;padding-left:7px;font-size:.85em}
.gauge{height:8px;border-radius:4px;background:var(--band);margin-top:12px;overflow:hidden}
.gauge i{display:block;height:100%;background:var(--plain)}
.legend{display:flex;flex-wrap:wrap;gap:6px 16px;margin:0 0 12px;font-size:.85rem;color:var(--muted)}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.two{display:grid;grid-template-columns:minmax(0,1.2fr) minmax(0,1fr);gap:28px;align-items:start}
@media (max-width:760px){.two{grid-template-columns:1fr}}
@media (max-width:600px){main{padding:24px 12px 60px}section{padding:16px 14px}th,td{padding:5px 7px}.facts th{width:110px}}
figure{margin:0}figcaption{color:var(--muted);font-size:.88rem;text-align:center}
.table{margin:0 0 24px}.table table{border-collapse:separate;border-spacing:0}
.table figcaption{text-align:left;max-width:90ch;margin:0 0 4px}
.table td,.table th{line-height:22px}.table td:first-child,.table th:first-child{position:sticky;left:0;background:var(--card)}
.table td.long:first-child{min-width:9.5em;overflow-wrap:anywhere}
.picture{margin:0 0 24px;max-width:560px}.picture svg{background:#fff;border-radius:8px}.picture figcaption{text-align:left;margin:6px 0 0}
svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--ink);font-family:inherit}
svg text.dim{fill:var(--muted)}
svg text.inside{fill:#fff;stroke:#000;stroke-opacity:.55;stroke-width:2.5px;paint-order:stroke}
svg .grid{stroke:var(--line);stroke-width:1}
ul{margin:0;padding-left:1.2em}li{margin:.3em 0}
@media print{section,.tile{break-inside:avoid}}
"""
