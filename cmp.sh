pkill -STOP -f chain.py; source /tmp/venv/bin/activate; export TF_CPP_MIN_LOG_LEVEL=3; cd /tmp/lstm
for i in 1 2 3; do for v in $*; do echo $v $(PYTHONPATH=/tmp/lstm/var/$v python seq.py 2>/dev/null); done; done
pkill -CONT -f chain.py
