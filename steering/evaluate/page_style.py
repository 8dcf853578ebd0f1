"""The look of the report's page: one style sheet, light and dark by the reader's setting."""

from __future__ import annotations

STYLE = """\
:root{--bg:#fbfbf9;
  --card:#fff;
  --ink:#1d2430;
  --muted:#667085;
  --line:#e3e5ea;
  --pale:#cfd4dc;
  --c1:#2f6fb5;
  --c2:#c2452d;
  --c3:#2e8b6f;
  --c4:#b7791f;
  --c5:#6b4fa0;
  --c6:#3d8fa8;
  --c7:#c05a93;
  --c8:#7a6a53;
  --good:#1f7a4d;
  --bad:#b3382c}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;
  --card:#1b1f26;
  --ink:#e6e9ef;
  --muted:#98a2b3;
  --line:#2e343e;
  --pale:#4a5261;
  --c1:#6ea8e6;
  --c2:#f0806a;
  --c3:#5cc2a0;
  --c4:#e0ae5c;
  --c5:#a78be0;
  --c6:#73c3da;
  --c7:#ea93c0;
  --c8:#b8a78c;
  --good:#5fce95;
  --bad:#f08b80}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 80px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:0 0 14px}
h3{font-size:1rem;margin:20px 0 8px}
header p{color:var(--muted);max-width:76ch;margin:0 0 8px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin-top:20px}
p{max-width:84ch;margin:10px 0}
small{color:var(--muted);font-size:.8em;white-space:nowrap}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
th{text-align:left;font-weight:600;color:var(--muted);padding:6px 14px 6px 0;border-bottom:2px solid var(--line)}
th{vertical-align:bottom}
td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
td:nth-child(2){white-space:normal}
figure{margin:14px 0}
figcaption{color:var(--muted);font-size:.85rem;max-width:84ch;margin-top:4px}
svg{max-width:100%;height:auto;display:inline-block;vertical-align:top}
svg text{fill:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .tick{fill:var(--muted);font-size:11px}
svg .axis{fill:var(--muted);font-size:12px}
svg .hint{fill:var(--good);font-size:11px;font-style:italic}
svg .inside{fill:var(--card);font-size:9.5px;font-weight:700}
svg .onbar{font-size:10.5px;fill:var(--card)}
svg .cell{font-size:11px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .error{stroke-width:1.4;opacity:.65}
svg .path{fill:none;stroke-width:1.8}
svg .dot{stroke:var(--card);stroke-width:1}
.legend{display:inline-block;vertical-align:top;margin:10px 0 0;padding-left:34px;font-size:.86rem;columns:1}
.side{display:flex;flex-wrap:wrap;gap:18px}
.side figure{flex:1 1 400px}
details{margin-top:12px}
summary{cursor:pointer;color:var(--muted)}
pre{overflow-x:auto;background:var(--bg);border:1px solid var(--line);border-radius:8px;padding:12px;font-size:.82rem}
.yes{color:var(--good);font-weight:600}
.no{color:var(--bad);font-weight:600}
.none{color:var(--muted)}
"""
