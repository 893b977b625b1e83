"""The package's own text and HTML templates."""

import jinja2


def load(name: str, *, autoescape: bool = False, **filters: object) -> jinja2.Template:
    """Return a template of this package, in which a name that is not given is an error.

    `autoescape` is for HTML: of every value, whatever the template is called.
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
