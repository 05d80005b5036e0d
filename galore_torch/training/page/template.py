"""What every page of `galore_torch.training.page.page` looks like: its HTML and its style, for jinja2."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --text: #1d2329; --faint: #59636e; --back: #ffffff; --raised: #f4f6f8; --rule: #d5dae0; --shadow: #59636e66; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --faint: #9aa5b1; --back: #14171a; --raised: #1f2429; --rule: #39414a; --shadow: #9aa5b166; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p { max-width: 42rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
.lead, caption, figcaption, dt { color: var(--faint); }
.box { overflow-x: auto; margin: 0.75rem 0;
  /* a shadow at the edge behind which there is more: the first two scroll along and cover it at the ends */
  background: linear-gradient(to right, var(--back) 30%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--back) 30%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--shadow), transparent) left / 0.8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shadow), transparent) right / 0.8rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; padding-bottom: 0.5rem; }
caption span { display: block; position: sticky; left: 0; width: max-content; max-width: min(42rem, 100vw - 2rem); }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--text); vertical-align: bottom; }
td { border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); }
.words { text-align: left; }
pre { background: var(--raised); padding: 0.75rem 1rem; border-radius: 6px; font-size: 0.85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.25rem; font-size: 0.9rem; margin: 0.75rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; max-width: 38rem; min-width: 20rem; height: auto; fill: currentColor; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { font-size: 0.9rem; max-width: 42rem; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if lead %}
<p class="lead">{{ lead }}</p>
{% endif %}
{% for block in blocks %}
{% if block.kind == "heading" %}
<h2>{{ block.text }}</h2>
{% elif block.kind == "text" %}
<p>{{ block.text }}</p>
{% elif block.kind == "code" %}
<pre><code>{{ block.text }}</code></pre>
{% elif block.kind == "facts" %}
<dl>
{% for name, value in block.facts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% elif block.kind == "table" %}
<div class="box" tabindex="0"><table>
{% if block.caption %}
<caption><span>{{ block.caption }}</span></caption>
{% endif %}
<thead><tr>
{% for column in block.columns %}
<th scope="col"{% if loop.index <= block.words %} class="words"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index <= block.words %} class="words"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% elif block.kind == "figure" %}
<figure><div class="box">{{ block.svg | safe }}</div><figcaption>{{ block.caption }}</figcaption></figure>
{% endif %}
{% endfor %}
</main>
</body>
</html>
"""
"""Takes ``title``, ``lead`` and ``blocks``; of what it is given, only a figure's SVG is not escaped."""
