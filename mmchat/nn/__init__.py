"""Layers that know no model family and do no input or output.

Shape comments use one letter an axis, everywhere in the package:
B batch · S new text positions · L cache length · E hidden size · H query heads ·
G key/value heads · D head dim · V vocabulary · I images · T tiles · P tokens per tile (patches and
the class token) · C channels · N positions attended.
"""
