#!/usr/bin/env bash
# Creates the Secrets that the manifests refer to, in kubectl's current cluster. Existing ones are kept, so it may be
# run again. Values are random unless the environment sets them; none is printed or passed as an argument. (The server
# does not validate the Secrets; the tests do.)
#
#   infra/secrets.sh [RUNS_NAMESPACE]     `kubeflow` (single-user KFP, the default) or `softpref` (multi-user)
#
#   DATABASE_USERNAME, DATABASE_PASSWORD            of a managed PostgreSQL
#   STORE_ACCESS_KEY, STORE_SECRET_KEY              of a bucket
#   HUB_TOKEN                                       for models and data sets that the Hub gates
#   JUDGE_KEY                                       for the endpoint of the judge llm
#   DATA_ACCESS_KEY, DATA_SECRET_KEY, DATA_ENDPOINT of a bucket with your own data or models; the last is the URL of a
#                                                   store other than Amazon's
set -euo pipefail

runs=${1:-kubeflow}
tracking=softpref-tracking
serving=softpref-serving

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
encode() { printf %s "$1" | base64 | tr -d '\n'; }

# make NAMESPACE NAME KEY=VALUE...: create a Secret unless it exists
make() {
    local namespace=$1 name=$2 data='' pair
    shift 2
    if kubectl --namespace "$namespace" get secret "$name" --output name >/dev/null 2>&1; then
        echo "$namespace/$name is there and stays as it is"
        return
    fi
    for pair in "$@"; do data+="${data:+,}\"${pair%%=*}\":\"$(encode "${pair#*=}")\""; done
    printf '{"apiVersion":"v1","kind":"Secret","type":"Opaque","metadata":{"name":"%s","namespace":"%s","labels":{"app.kubernetes.io/part-of":"softpref"}},"data":{%s}}' \
        "$name" "$namespace" "$data" | kubectl create --validate=ignore --filename - >/dev/null
    echo "$namespace/$name made"
}

# value NAMESPACE NAME KEY: print a value of a Secret
value() {
    kubectl --namespace "$1" get secret "$2" --output "jsonpath={.data.$3}" | base64 --decode
}

if ! kubectl get namespace "$runs" --output name >/dev/null 2>&1; then
    echo "no namespace $runs: install Kubeflow Pipelines, or apply the profile first; is kubectl at your cluster?" >&2
    exit 1
fi
for base in tracking serving; do
    kubectl get namespace "softpref-$base" --output name >/dev/null 2>&1 ||
        kubectl apply --validate=ignore --filename "$(dirname "$0")/base/$base/namespace.yaml"
done

key=${STORE_ACCESS_KEY:-$(random)}
secret=${STORE_SECRET_KEY:-$(random)}
make "$tracking" postgres "username=${DATABASE_USERNAME:-mlflow}" "password=${DATABASE_PASSWORD:-$(random)}"
make "$tracking" object-store "access-key=$key" "secret-key=$secret" \
    "s3.json={\"identities\":[{\"name\":\"mlflow\",\"credentials\":[{\"accessKey\":\"$key\",\"secretKey\":\"$secret\"}],\"actions\":[\"Admin\"]}]}"
make "$tracking" mlflow-server "flask-secret-key=$(random)"
make "$tracking" mlflow-admin username=admin "password=$(random)"
make "$tracking" mlflow-credentials username=softpref "password=$(random)"
make "$tracking" mlflow-serving-credentials username=serving "password=$(random)"

# the same logins in the namespaces of their users; KFP's MLflow plugin requires the name kfp-mlflow-credentials
user=$(value "$tracking" mlflow-credentials username)
password=$(value "$tracking" mlflow-credentials password)
make "$runs" mlflow-credentials "username=$user" "password=$password"
make "$runs" kfp-mlflow-credentials "username=$user" "password=$password"
make "$serving" mlflow-credentials "username=$(value "$tracking" mlflow-serving-credentials username)" \
    "password=$(value "$tracking" mlflow-serving-credentials password)"
if [ -n "${HUB_TOKEN:-}" ]; then
    make "$runs" hub-token "token=$HUB_TOKEN"
fi
if [ -n "${JUDGE_KEY:-}" ]; then
    make "$runs" judge-key "key=$JUDGE_KEY"
fi
if [ -n "${DATA_ACCESS_KEY:-}" ]; then
    make "$runs" data-store "access-key=$DATA_ACCESS_KEY" "secret-key=$DATA_SECRET_KEY" \
        ${DATA_ENDPOINT:+"endpoint=$DATA_ENDPOINT"}
fi
