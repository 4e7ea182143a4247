"""The text floor: TF-IDF and logistic regression on the same rows. A probe that does not beat it has read words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.data import Row
from training.fit import balanced


def tfidf_scores(fit: Sequence[Row], texts: Sequence[str]) -> list[float]:
    """Decision values of the texts, > 0 leans harmful. A row whose label is about its answer is read by that."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    features = vectorizer.fit_transform([r.answer or r.text for r in fit])
    labels = np.array([r.label for r in fit])
    weights = balanced(labels, np.array([r.weight for r in fit]))
    model = LogisticRegression(C=10, max_iter=1000).fit(features, labels, sample_weight=weights)
    scores: list[float] = model.decision_function(vectorizer.transform(texts)).tolist()
    return scores
