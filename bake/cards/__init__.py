"""Model cards: what they say, from the record and the report, and what a card can get wrong.

Reading order: ``licences``, ``frontmatter``; ``text``, ``stored``, ``base``, ``facts``;
``methods``, ``notices``, ``edits``, ``changes``, ``figures``, ``commands``, ``terms``,
``metadata``; ``templates``, ``view``, ``stamp``, ``markdown``, ``lint_metadata``, ``lint_blocks``,
``lint``; ``card`` puts them together.
"""
