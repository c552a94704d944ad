"""Model cards: what they say, from the record and the report, and what a card can get wrong.

Reading order: ``licences``, ``stamp``; ``text``, ``facts``;
``methods``, ``edits``, ``notices``, ``changes``, ``commands``, ``metadata``;
``templates``, ``view``; ``markdown``, ``lint_metadata``, ``lint``; ``card`` puts them together.
"""
