"""The report (jinja2): one body, and what its parts look like in Markdown and in HTML.

What a template prints and has not made itself is a text from outside, and is escaped: names of sizes and runs come from
tables that anybody may have written.
"""

import html
import re
from collections.abc import Callable
from typing import Any

import jinja2
from markupsafe import Markup

# Before what has a meaning in Markdown wherever it stands, a _ outside words, and what becomes a link by itself.
SIGNS = re.compile(r"(?=[\\`*\[\]{}|~$@#])|(?<!\w)(?=_)|(?=_(?!\w))|(?<=www)(?=\.)|(?=:/)")

BODY = """\
{{ heading(1, "Scaling of " ~ title ~ " with training compute") }}
{{ answer(headlines[0]) }}
{% for refusal in study.refusals %}
{{ note("Refused", "refusal", refusal) }}
{% endfor %}
{% for caution in study.cautions %}
{{ note("Caution", "caution", caution) }}
{% endfor %}
{% if headlines[1:] %}
{{ items(headlines[1:]) }}
{% endif %}
{% for refusal in study.unfitted %}
{{ note("Not fitted", "small", refusal) }}
{% endfor %}
{{ figure("curves", study.question.metric ~ " against training compute") }}
{{ heading(2, "Sizes, at their last evaluation") }}
{{ table(*sizes) }}
{% if predictions and held_out %}
{{ heading(2, "Prediction and measurement: " ~ held_out) }}
{% call paragraph() %}
The largest held-out compute is {{ extrapolation }} times the largest fitted one.
A point that does not count lies above the frontier (or is not the run's last): the law makes no claim about it.
{% endcall %}
{% for name, rows in predictions %}
{{ heading(3, name | capitalize ~ " law") }}
{% set interval = percent ~ " interval" %}
{{ table(["run", "step", "training FLOPs", "measured", "predicted", interval, "error", "inside", "counts"], rows) }}
{% endfor %}
{% endif %}
{{ figure("predictions", "predicted against measured") }}
{% for law in laws %}
{{ heading(2, law.name | capitalize ~ " law: " ~ law.formula) }}
{% call paragraph() %}
{{ law.fitted }}; at {{ law.reference }}.
Scatter {{ law.scatter }}; best fit reached from {{ law.reached }} starts;
intervals from {{ study.question.resamples }} refits with the deviation of every run drawn anew.
{% endcall %}
{{ table(["parameter", "value", percent ~ " interval"], law.lines) }}
{% endfor %}
{{ figure("residuals", "residuals") }}
{% if optimal %}
{{ heading(2, "Constants and compute-optimal training") }}
{{ figure("isoflop", "isoFLOP curves") }}
{% for part in optimal %}
{{ heading(3, part.heading) }}
{% call paragraph() %}
{{ part.text }}
{% endcall %}
{{ table(part.header, part.rows) }}
{% endfor %}
{% endif %}
{% if "samples" in figures %}
{{ heading(2, "Samples along the curve") }}
{{ figure("samples", "samples along the curve") }}
{% call paragraph() %}
Every folder's first images, drawn from the same noise and classes where the seed is the same. The number over them was
measured on images made as they were (of all sizes of the data set); a dashed line leads to a point measured otherwise.
{% endcall %}
{{ contact_sheets(sheets) }}
{% endif %}
{{ heading(2, "How it was measured") }}
{{ items(key or ["no comparability key in the table"]) }}
{% call paragraph() %}
Data {{ data_hash }}, seed {{ study.question.seed }}.
{% endcall %}
"""

MARKDOWN_PARTS = """\
{% macro heading(level, text) %}
{% for _ in range(level) %}#{% endfor %} {{ text }}
{% endmacro %}
{% macro note(word, kind, it) %}
> **{{ word }} ({{ it.code }})**: {{ it.message }}
{% endmacro %}
{% macro answer(text) %}
**{{ text }}**
{% endmacro %}
{% macro items(texts) %}
{% for text in texts %}
- {{ text }}
{% endfor %}
{% endmacro %}
{% macro paragraph() %}
{{ caller() }}
{% endmacro %}
{% macro figure(name, what) %}
{% if name in figures %}
![{{ what }}]({{ figures[name] }})
{% endif %}
{% endmacro %}
{% macro table(header, rows) %}
|{% for name in header %} {{ name }} |{% endfor %}

|{% for _ in header %}---|{% endfor %}

{% for row in rows %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}
{% endmacro %}
{% macro contact_sheets(sheets) %}{% endmacro %}
"""

HTML_PARTS = """\
{% macro heading(level, text) %}<h{{ level }}>{{ text }}</h{{ level }}>{% endmacro %}
{% macro note(word, kind, it) %}
<p class="{{ kind }}"><strong>{{ word }} ({{ it.code }}).</strong> {{ it.message }}</p>
{% endmacro %}
{% macro answer(text) %}<p class="answer">{{ text }}</p>{% endmacro %}
{% macro items(texts) %}
<ul>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ul>
{% endmacro %}
{% macro paragraph() %}<p class="small">{{ caller() }}</p>{% endmacro %}
{% macro figure(name, what) %}
{% if name in figures %}
<figure><img src="{{ figures[name] }}" alt="{{ what }}"></figure>
{% endif %}
{% endmacro %}
{% macro table(header, rows) %}
<div class="wide"><table>
<tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro contact_sheets(sheets) %}
{% for caption, source in sheets %}
<details><summary>{{ caption }}</summary><img src="{{ source }}" alt="{{ caption }}"></details>
{% endfor %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scaling of {{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  overflow-wrap: anywhere; }
.answer { font-size: 1.15rem; padding: 0.6rem 0.9rem; border-left: 5px solid #2c6fbb; background: #eaf2fb; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap;
  overflow-wrap: normal; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.refusal, .caution { padding: 0.5rem 0.9rem; margin: 0.5rem 0; border-left: 5px solid #c0392b; background: #fbeae8; }
.caution { border-color: #d99a00; background: #fdf5e2; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figure img { width: 60rem; }
.small { color: #555; font-size: 0.88rem; }
</style>
</head>
<body>
"""

MARKDOWN = MARKDOWN_PARTS + BODY
HTML = HTML_PARTS + BODY + "</body>\n</html>\n"


def render(template: str, content: dict[str, Any], escape: Callable[[str], Markup]) -> str:
    """`template` filled with `content`, whose texts are put on one line and escaped."""

    def printed(value: Any) -> Markup:
        return value if isinstance(value, Markup) else escape(on_one_line(str(value)))

    environment = jinja2.Environment(
        autoescape=True, finalize=printed, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(content)


def in_markdown(text: str) -> Markup:
    """The text as Markdown shows it, whatever signs it holds."""
    return Markup(SIGNS.sub(r"\\", html.escape(text, quote=False)))


def on_one_line(text: str) -> str:
    """The text with a space for every white space, and a mark for every other character that is not printed."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
