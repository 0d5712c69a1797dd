"""How the page looks: gradio's own parts wear the colours of app.css, and nothing is loaded from elsewhere."""

from pathlib import Path

import gradio as gr

CSS = Path(__file__).parent / "app.css"
SCRIPTS = Path(__file__).parent
FONTS = ("system-ui", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine; every colour is a variable of app.css, which knows light and dark."""
    base = gr.themes.Base(font=FONTS, font_mono=MONO, radius_size="md")
    colours = {
        "body_background_fill": "var(--paper)",
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--muted)",
        "background_fill_primary": "var(--sheet)",
        "background_fill_secondary": "var(--paper)",
        "block_background_fill": "transparent",
        "block_border_color": "transparent",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "var(--muted)",
        "block_title_text_color": "var(--muted)",
        "border_color_primary": "var(--line)",
        "border_color_accent": "var(--accent)",
        "color_accent_soft": "var(--wash)",
        "input_background_fill": "var(--sheet)",
        "input_background_fill_focus": "var(--sheet)",
        "input_border_color": "var(--edge)",
        "input_border_color_focus": "var(--accent)",
        "checkbox_label_border_color": "var(--edge)",
        "input_placeholder_color": "var(--muted)",
        "checkbox_label_background_fill": "var(--sheet)",
        "checkbox_label_background_fill_selected": "var(--wash)",
        "checkbox_label_text_color": "var(--ink)",
        "checkbox_label_text_color_selected": "var(--ink)",
        "checkbox_background_color_selected": "var(--accent)",
        "checkbox_border_color_selected": "var(--accent)",
        "button_primary_background_fill": "var(--accent)",
        "button_primary_background_fill_hover": "var(--accent)",
        "button_primary_border_color": "var(--accent)",
        "button_primary_border_color_hover": "var(--accent)",
        "button_primary_text_color": "var(--sheet)",
        "button_secondary_background_fill": "var(--sheet)",
        "button_secondary_text_color": "var(--ink)",
        "button_secondary_border_color": "var(--edge)",
        "error_background_fill": "var(--note)",
        "error_text_color": "var(--bad)",
        "link_text_color": "var(--accent)",
    }
    dark = {f"{key}_dark": value for key, value in colours.items()}
    edges = {"input_border_width": "1px", "checkbox_label_border_width": "1px"}
    return base.set(color_accent="var(--accent)", **edges, **colours, **dark)


def script(name: str) -> str:
    """The JavaScript of a custom component, a file beside this one."""
    return (SCRIPTS / f"{name}.js").read_text("utf-8")


def component(name: str, value: str = "", js: str = "", label: str = "") -> gr.HTML:
    """A part of the page of our own: server-made HTML as its value, events from the script `js`."""
    return gr.HTML(value, elem_id=name, js_on_load=script(js) if js else None, apply_default_css=False, label=label or None)
