# The trainer with your verifiers and what they import. In the directory of your modules:
#
#   docker build --file .../verifier.Dockerfile --build-arg TRAINER_IMAGE=.../stillhouse/trainer@sha256:... \
#     --build-arg PACKAGES="sqlglot==30.30.0" --tag ... .
#
# The secrets `pip` and `ca` are those of scripts/build_images.sh.
ARG TRAINER_IMAGE=stillhouse/trainer:0.1.0

FROM ${TRAINER_IMAGE} AS tools
USER 0
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
    && python3 -m venv /opt/tools \
    && PIP_CONFIG_FILE=/run/secrets/pip /opt/tools/bin/pip install --no-cache-dir --quiet cyclonedx-bom==7.5.0

FROM ${TRAINER_IMAGE}
# Packages with their versions, separated by spaces.
ARG PACKAGES
USER 0
# pip is lent by the stage above and stays there. The constraints hold what the image already has at its versions.
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/tmp/tools \
    --mount=type=secret,id=pip --mount=type=secret,id=ca \
    PIP_CONFIG_FILE=/run/secrets/pip /tmp/tools/bin/python -m pip --python /opt/stillhouse/bin/python install \
         --no-cache-dir --quiet --constraint /usr/share/stillhouse/constraints.txt \
         ${PACKAGES} \
    && /tmp/tools/bin/python -m cyclonedx_py environment /opt/stillhouse/bin/python --output-reproducible \
         --output-format JSON --output-file /usr/share/stillhouse/sbom.cdx.json
COPY *.py /opt/verifiers/
ENV PYTHONPATH=/opt/verifiers
USER 65532:65532
