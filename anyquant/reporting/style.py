"""The style sheet that all reports share."""

from __future__ import annotations

CSS = """
:root{--ink:#0f172a;--soft:#64748b;--line:#e2e8f0;--good:#047857;--bad:#b91c1c}
*{box-sizing:border-box}
body{margin:0;background:#f1f5f9;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;justify-content:space-between;align-items:center;gap:24px;margin-bottom:20px}
h1{margin:0;font-size:30px;letter-spacing:-.02em}
header p{margin:4px 0 0;color:var(--soft)}
.verdict{text-align:right;white-space:nowrap}
.badge{display:inline-block;padding:7px 20px;border-radius:999px;color:#fff;font-weight:700;letter-spacing:.08em}
.badge.good{background:var(--good)}.badge.bad{background:var(--bad)}
.cards{display:flex;flex-wrap:wrap;gap:14px;margin-bottom:14px}
.card,section{background:#fff;border:1px solid var(--line);border-radius:12px}
.card{flex:1 1 150px;padding:14px 18px}
.card h3{margin:0;font-size:13px;font-weight:500;color:var(--soft)}
.card strong{display:block;font-size:27px;line-height:1.35;letter-spacing:-.02em}
.card p{margin:0;font-size:13px;color:var(--soft)}
section{padding:18px 22px;margin-bottom:14px}
h2{margin:0 0 10px;font-size:17px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{color:var(--soft);font-weight:500;font-size:12.5px;text-align:left;vertical-align:bottom}
th,td{padding:7px 10px 7px 0;border-bottom:1px solid var(--line)}
tbody tr:last-child td{border-bottom:0}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.number{white-space:normal}
.mark{display:inline-block;padding:1px 9px;border-radius:999px;font-size:12px;font-weight:600}
.mark.good{background:#d1fae5;color:var(--good)}.mark.bad{background:#fee2e2;color:var(--bad)}
.plots{display:flex;flex-wrap:wrap;gap:18px}
figure{flex:1 1 340px;max-width:560px;margin:0}figcaption{font-weight:600;margin-bottom:4px}
figure svg{width:100%;height:auto}
.text{margin-bottom:12px}.text h3{margin:0 0 4px;font-size:14px}.text span{font-weight:400;color:var(--soft)}
pre{margin:0;padding:10px 14px;background:#f8fafc;border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
.small{color:var(--soft);font-size:12.5px;margin:10px 0 0}
dl{display:grid;grid-template-columns:110px 1fr;gap:4px 16px;margin:0;font-size:13.5px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:640px){header{display:block}.verdict{text-align:left;margin-top:12px}}
"""
