"""The report's Markdown and HTML (jinja2)."""

MARKDOWN = """\
# Scaling of {{ title }} with training compute

{% for refusal in refusals %}
> **Refused ({{ refusal.code }})**: {{ refusal.message }}

{% endfor %}
{% for caution in cautions %}
> **Caution ({{ caution.code }})**: {{ caution.message }}

{% endfor %}
{% for headline in headlines %}
- {{ headline }}
{% endfor %}

{% if "curves" in figures %}
![{{ metric }} against training compute]({{ figures.curves }})
{% endif %}

## Sizes, at their last evaluation

| {{ sizes[0] | join(" | ") }} |
|{% for _ in sizes[0] %}---|{% endfor %}

{% for row in sizes[1] %}
| {{ row | join(" | ") }} |
{% endfor %}

{% if predictions and held_out %}
## Prediction and measurement of the held-out size {{ held_out }}

The largest held-out compute is {{ extrapolation }} times the largest fitted one.
A point that does not count lies above the frontier (or is not the run's last): the law makes no claim about it.

{% for name, rows in predictions %}
{{ name }} law:

| run | step | training FLOPs | measured | predicted | 90 % interval | error | inside | counts |
|---|---|---|---|---|---|---|---|---|
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endfor %}
{% endif %}
{% if "predictions" in figures %}
![predicted against measured]({{ figures.predictions }})

{% endif %}
{% for law in laws %}
## {{ law.name | capitalize }} law: {{ law.formula }}

{{ law.fitted }}; at {{ law.reference }}.
Scatter {{ law.scatter }}; best fit reached from {{ law.reached }} starts;
intervals from {{ question.resamples }} refits with the luck of every run drawn anew.

| parameter | value | 90 % interval |
|---|---|---|
{% for line in law.lines %}
| {{ line | join(" | ") }} |
{% endfor %}

{% endfor %}
{% if "residuals" in figures %}
![residuals]({{ figures.residuals }})

{% endif %}
{% if isoflops %}
## Compute-optimal size

{% if "isoflop" in figures %}
![isoFLOP curves]({{ figures.isoflop }})

{% endif %}
{% for iso in isoflops %}
{{ iso.text }}

| budget (FLOPs) | best parameters | {{ metric }} there | spread of ln(parameters) |
|---|---|---|---|
{% for row in iso.optima %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endfor %}
{% endif %}
{% if "samples" in figures %}
## Samples along the curve

![samples along the curve]({{ figures.samples }})

{% endif %}
## How it was measured

{% for name, value in key.items() %}
- {{ name }}: {{ value }}
{% else %}
- no comparability key in the table
{% endfor %}

Data {{ data_hash }}, seed {{ question.seed }}.
"""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scaling of {{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.refusal, .caution { padding: 0.5rem 0.9rem; margin: 0.5rem 0; border-left: 5px solid #c0392b; background: #fbeae8; }
.caution { border-color: #d99a00; background: #fdf5e2; }
.headline { font-size: 1.05rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; overflow-x: auto; } figure img { width: 60rem; min-width: 36rem; }
figcaption, .small { color: #555; font-size: 0.88rem; }
</style>
</head>
<body>
<h1>Scaling of {{ title }} with training compute</h1>
{% for refusal in refusals %}
<p class="refusal"><strong>Refused ({{ refusal.code }}).</strong> {{ refusal.message }}</p>
{% endfor %}
{% for caution in cautions %}
<p class="caution"><strong>Caution ({{ caution.code }}).</strong> {{ caution.message }}</p>
{% endfor %}
{% for headline in headlines %}
<p class="headline">{{ headline }}</p>
{% endfor %}
{% if "curves" in figures %}
<figure><img src="{{ figures.curves }}" alt="{{ metric }} against training compute"></figure>
{% endif %}
<h2>Sizes, at their last evaluation</h2>
<div class="wide"><table>
<tr>{% for name in sizes[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in sizes[1] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if predictions and held_out %}
<h2>Prediction and measurement of the held-out size {{ held_out }}</h2>
<p class="small">The largest held-out compute is {{ extrapolation }} times the largest fitted one.
A point that does not count lies above the frontier (or is not the run's last): the law makes no claim about it.</p>
{% for name, rows in predictions %}
<h3>{{ name | capitalize }} law</h3>
<div class="wide"><table>
<tr><th>run</th><th>step</th><th>training FLOPs</th><th>measured</th><th>predicted</th><th>90 % interval</th>
<th>error</th><th>inside</th><th>counts</th></tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endif %}
{% if "predictions" in figures %}
<figure><img src="{{ figures.predictions }}" alt="predicted against measured"></figure>
{% endif %}
{% for law in laws %}
<h2>{{ law.name | capitalize }} law: {{ law.formula }}</h2>
<p class="small">{{ law.fitted }}; at {{ law.reference }}.
Scatter {{ law.scatter }}; best fit reached from {{ law.reached }} starts;
intervals from {{ question.resamples }} refits with the luck of every run drawn anew.</p>
<table>
<tr><th>parameter</th><th>value</th><th>90 % interval</th></tr>
{% for line in law.lines %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% if "residuals" in figures %}
<figure><img src="{{ figures.residuals }}" alt="residuals"></figure>
{% endif %}
{% if isoflops %}
<h2>Compute-optimal size</h2>
{% if "isoflop" in figures %}
<figure><img src="{{ figures.isoflop }}" alt="isoFLOP curves"></figure>
{% endif %}
{% for iso in isoflops %}
<p>{{ iso.text }}</p>
<table>
<tr><th>budget (FLOPs)</th><th>best parameters</th><th>{{ metric }} there</th><th>spread of ln(parameters)</th></tr>
{% for row in iso.optima %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% endif %}
{% if "samples" in figures %}
<h2>Samples along the curve</h2>
<figure><img src="{{ figures.samples }}" alt="samples along the curve">
<figcaption>Every folder's first images, drawn from the same noise and classes where the seed is the same.</figcaption>
</figure>
{% for caption, source in sheets %}
<details><summary>{{ caption }}</summary><img src="{{ source }}" alt="{{ caption }}"></details>
{% endfor %}
{% endif %}
<h2>How it was measured</h2>
<table>
{% for name, value in key.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% else %}
<tr><td>no comparability key in the table</td></tr>
{% endfor %}
</table>
<p class="small">Data {{ data_hash }}, seed {{ question.seed }}.</p>
</body>
</html>
"""
