"""Pages from templates."""

from typing import Any

import jinja2


def rendered(package: str | None, template: str, **values: Any) -> str:
    """
    A page; texts in the values are escaped.

    Args:
        package: that holds the template, `__package__` of the caller.
        template: the name of its file.
        values: by their names in the template.
    """
    loader = jinja2.PackageLoader(package or "", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)
