"""What a model card is made of; ``bake.publish.card`` puts it together.

Reading order: ``text``, ``stored``, ``base``, ``facts``; ``methods``, ``notices``, ``edits``,
``changes``, ``figures``, ``commands``, ``terms``, ``metadata``; ``templates``, ``view``, ``stamp``,
``markdown``, ``lint_metadata``, ``lint_blocks``, ``lint``.
"""
