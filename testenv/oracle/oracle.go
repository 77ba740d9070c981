package oracle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// An Oracle reads the TRACE lines that the kernel prints from Start on.
type Oracle struct {
	kmsg       int // /dev/kmsg, one record per read
	namespaces []string
	lines      []string
	marks      int
	lastSeq    uint64
	haveSeq    bool
}

const ruleset = `
table inet oracle {
	chain pre {
		type filter hook prerouting priority -350; policy accept;
		meta nftrace set 1
	}
	chain out {
		type filter hook output priority -350; policy accept;
		meta nftrace set 1
	}
}
`

// Start makes the kernel print the path of every packet of the namespaces.
func Start(ctx context.Context, namespaces ...string) (*Oracle, error) {
	if os.Getenv("NFTRACE_IN_VM") != "1" {
		return nil, errors.New("oracle: it changes rules and sysctls: run it in a VM (testenv/cmd/vm)")
	}
	// Until 5.12 the loggers were one module per family.
	if err := run(ctx, "", "modprobe", "-q", "nf_log_syslog"); err != nil {
		if err := run(ctx, "", "modprobe", "-a", "nf_log_ipv4", "nf_log_ipv6"); err != nil {
			return nil, fmt.Errorf("oracle: no logger for TRACE: %w", err)
		}
	}
	// Without this, nf_log_syslog prints for the initial namespace only.
	if err := os.WriteFile("/proc/sys/net/netfilter/nf_log_all_netns", []byte("1"), 0); err != nil {
		return nil, fmt.Errorf("oracle: %w", err)
	}
	o := &Oracle{namespaces: namespaces}
	for _, ns := range namespaces {
		script := `cd /proc/sys/net/netfilter/nf_log
for f in 2:nf_log_ipv4 10:nf_log_ipv6; do
	[ "$(cat ${f%:*})" = ${f#*:} ] || echo ${f#*:} > ${f%:*}
done
exec nft -f -`
		if err := run(ctx, ruleset, "ip", "netns", "exec", ns, "sh", "-e", "-c", script); err != nil {
			o.Close(ctx)
			return nil, fmt.Errorf("oracle: namespace %s: %w", ns, err)
		}
	}
	var err error
	if o.kmsg, err = syscall.Open("/dev/kmsg", syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0); err != nil {
		o.Close(ctx)
		return nil, fmt.Errorf("oracle: /dev/kmsg: %w", err)
	}
	if _, err := syscall.Seek(o.kmsg, 0, 2 /* SEEK_END */); err != nil {
		o.Close(ctx)
		return nil, fmt.Errorf("oracle: /dev/kmsg: %w", err)
	}
	return o, nil
}

// Without returns a tool's output without the lines of which the kernel logs nothing, for it has
// TRACE for iptables only: those about the oracle's own table, which is nf_tables', and about
// ebtables, whose tables every namespace has in Linux 5.10 once the modules are there.
func Without(output string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		if !strings.HasPrefix(line, "TRACE: inet:oracle:") && !strings.HasPrefix(line, "TRACE: eb:") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// Close takes the oracle's tables away.
func (o *Oracle) Close(ctx context.Context) error {
	if o.kmsg > 0 {
		syscall.Close(o.kmsg)
	}
	var errs []error
	for _, ns := range o.namespaces {
		errs = append(errs, run(ctx, "", "ip", "netns", "exec", ns, "nft", "delete table inet oracle"))
	}
	return errors.Join(errs...)
}

// Lines returns all that was printed since Start, in the kernel's order, each
// line from "TRACE: " on. A packet's lines are in the log when the packet has
// passed, so there is nothing to wait for. It fails if the log has overrun
// what was not read yet: boot with a larger log_buf_len, or call it more often.
func (o *Oracle) Lines() ([]string, error) {
	// The end is a line of our own: what comes after it belongs to the next call.
	o.marks++
	mark := fmt.Sprintf("nftrace-oracle: pid %d mark %d", os.Getpid(), o.marks)
	if _, err := syscall.Write(o.kmsg, []byte("<5>"+mark+"\n")); err != nil {
		return nil, fmt.Errorf("oracle: /dev/kmsg: %w", err)
	}
	buf := make([]byte, 16<<10)
	for {
		n, err := syscall.Read(o.kmsg, buf)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EPIPE):
			return nil, errors.New("oracle: the kernel's log has overrun: lines are lost; raise log_buf_len or read more often")
		case errors.Is(err, syscall.EAGAIN):
			return nil, errors.New("oracle: the end of the kernel's log came before the oracle's own line; boot with printk.devkmsg=on")
		case err != nil:
			return nil, fmt.Errorf("oracle: /dev/kmsg: %w", err)
		}
		seq, text, err := parseRecord(buf[:n])
		if err != nil {
			return nil, err
		}
		if o.haveSeq && seq != o.lastSeq+1 {
			return nil, fmt.Errorf("oracle: %d records of the kernel's log are missing", seq-o.lastSeq-1)
		}
		o.lastSeq, o.haveSeq = seq, true
		if strings.Contains(text, mark) {
			return o.lines, nil
		}
		if i := strings.Index(text, "TRACE: "); i >= 0 {
			o.lines = append(o.lines, text[i:])
		}
	}
}

// parseRecord splits a record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg):
// "level,sequence,time,flags[,…];text\n", then lines of "key=value".
func parseRecord(b []byte) (seq uint64, text string, err error) {
	head, rest, ok := bytes.Cut(b, []byte(";"))
	if !ok {
		return 0, "", fmt.Errorf("oracle: not a record of /dev/kmsg: %q", b)
	}
	var level, usec uint64
	if _, err := fmt.Sscanf(string(head), "%d,%d,%d,", &level, &seq, &usec); err != nil {
		return 0, "", fmt.Errorf("oracle: not a record of /dev/kmsg: %q", b)
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	return seq, string(line), nil
}

func run(ctx context.Context, stdin, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(out))
	}
	return nil
}
