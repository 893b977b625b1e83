"""The package's own text and HTML templates."""

import jinja2


def load(name: str, *, autoescape: bool = False, **filters: object) -> jinja2.Template:
    """Return a template of this package, in which an undefined name is an error.

    `autoescape` escapes every value for HTML, whatever the template's file name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hotdog_hf", "."),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
