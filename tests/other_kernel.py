"""A pytest plugin (``-p tests.other_kernel``): use the kernel that lies in $OTHER_KERNEL."""

from __future__ import annotations

import os

import apollo_qn.backends as package

package.__path__.insert(0, os.environ["OTHER_KERNEL"])
