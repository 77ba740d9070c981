package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/trace"
)

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                     "plain",
		"at the end\n\n":            "at the end",
		"a\nb":                      "a; b",
		"tab\there":                 `tab\x09here`,
		"\x1b]0;title\a":            `\x1b]0;title\x07`,
		"\r\x7f\u009b":              `\x0d\x7f\x9b`,
		"übel → …":                  "übel → …",
		"left\u202eright\u2066":     `left\u202eright\u2066`,
		"line\u2028paragraph\ufeff": `line\u2028paragraph\ufeff`,
	} {
		if got := oneLine(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("a\nb\x1b[31m\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		got := oneLine(s)
		if again := oneLine(got); again != got {
			t.Errorf("%q becomes %q", got, again)
		}
		if strings.ContainsAny(got, "\n\r\x1b\a\b\x7f\u009b\u202e") {
			t.Errorf("%q", got)
		}
	})
}

func TestSpeaker(t *testing.T) {
	for _, tt := range []struct {
		s    speaker
		want string
	}{
		{speaker{}, "nftrace: f\nnftrace: s 1\n"},
		{speaker{quiet: true}, "nftrace: f\n"},
		{speaker{verbose: true}, "nftrace: f\nnftrace: s 1\nnftrace: d\n"},
		{speaker{verbose: true, quiet: true}, "nftrace: f\n"},
	} {
		var b bytes.Buffer
		tt.s.w = &b
		tt.s.fail(errors.New("f"))
		tt.s.say("s %d", 1)
		tt.s.detail("d")
		if b.String() != tt.want {
			t.Errorf("%+v: %q, want %q", tt.s, b.String(), tt.want)
		}
	}
}

func TestSummary(t *testing.T) {
	for _, tt := range []struct {
		printed    uint64
		st         events.Stats
		l          trace.Losses
		d          dropped
		unresolved uint64
		want       string
	}{
		{want: "0 packets, 0 records, 0 lost, 0 unresolved"},
		{printed: 7, st: events.Stats{Records: 13}, unresolved: 2, want: "7 packets, 13 records, 0 lost, 2 unresolved"},
		{st: events.Stats{Records: 1, Bad: 3}, want: "0 packets, 1 records, 3 lost (3 records: unreadable), 0 unresolved"},
		{
			st: events.Stats{Bad: 1, Lost: 17, Skipped: 13},
			l:  trace.Losses{RingBuffer: 2, Journeys: 3, Frames: 5, Probes: 11},
			want: "0 packets, 0 records, 24 lost (2 records: buffer full, 3 packets: too many at once, " +
				"5 hook calls: too many at once on a CPU, " +
				"1 records: unreadable, 11 calls of probes skipped by the kernel, of whatever packets, " +
				"13 hook calls: the kernel skipped the probe of nf_tables), 0 unresolved",
		},
		{
			printed: 5, st: events.Stats{Records: 40}, d: dropped{packets: 3, records: 17},
			want: "5 packets, 40 records, 20 lost (3 packets: not written when interrupted again, " +
				"17 records: not read when interrupted again), 0 unresolved",
		},
	} {
		if got := summary(tt.printed, tt.st, tt.l, tt.d, tt.unresolved); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
}

func TestWhyNo(t *testing.T) {
	path := func(err error) error { return &fs.PathError{Op: "open", Path: "/d/f", Err: err} }
	for _, tt := range []struct {
		err  error
		want string
	}{
		{path(unix.ENOENT), "/d/f: the directory /d does not exist"},
		{path(unix.ENOTDIR), "/d/f: /d is not a directory"},
		{path(unix.EISDIR), "/d/f is a directory: name a file in it"},
		{path(unix.EROFS), "/d/f: the file system is read-only: choose another place"},
		{path(unix.ENOSPC), "/d/f: the file system is full: choose another place"},
		{path(unix.EACCES), "/d/f: permission denied"},
	} {
		if got := whyNoFile("/d/f", tt.err).Error(); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&exec.Error{Name: "x", Err: exec.ErrNotFound}, `command "x" is not in PATH`},
		{&exec.Error{Name: "x", Err: unix.EACCES}, `command "x" cannot be run: permission denied`},
		{path(unix.ENOEXEC), `command "x" cannot be run: exec format error`},
	} {
		if got := whyNoCommand("x", tt.err).Error(); !strings.HasPrefix(got, tt.want) {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

// Where the directory is there, the error does not say that it is not.
func TestWhyNoFileThere(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/nosuch/x", link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		link:      link + " is a link to /nosuch/x, where no file can be made: name that file itself, in a directory that is there",
		"/proc/x": "/proc/x: no files can be made in /proc: choose another place",
	} {
		if _, err := openOutput(&config{output: path}, nil); err == nil || err.Error() != "-o "+want {
			t.Errorf("got  %v\nwant -o %s", err, want)
		}
	}
}

// A run that does not begin leaves the file as it was, or no file.
func TestOutputFile(t *testing.T) {
	tmp := t.TempDir()
	old, fresh := filepath.Join(tmp, "old"), filepath.Join(tmp, "new")
	if err := os.WriteFile(old, []byte("from before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(path string) *output {
		t.Helper()
		o, err := openOutput(&config{output: path}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	content := func(path string) string {
		data, err := os.ReadFile(path)
		if err != nil {
			return "none"
		}
		return string(data)
	}
	for path, want := range map[string]string{old: "from before\n", fresh: "none"} {
		open(path).abandon()
		if got := content(path); got != want {
			t.Errorf("abandoned: %s holds %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{old, fresh} {
		o := open(path)
		if err := o.begin(); err != nil {
			t.Fatal(err)
		}
		o.buf = append(o.buf, "x\n"...)
		if err := o.close(); err != nil {
			t.Fatal(err)
		}
		if got := content(path); got != "x\n" {
			t.Errorf("%s holds %q", path, got)
		}
	}
	// A link to a file that is not there yet.
	link := filepath.Join(tmp, "link")
	if err := os.Symlink(filepath.Join(tmp, "target"), link); err != nil {
		t.Fatal(err)
	}
	o := open(link)
	if err := errors.Join(o.begin(), o.close()); err != nil || content(filepath.Join(tmp, "target")) != "" {
		t.Errorf("behind the link: %q, %v", content(filepath.Join(tmp, "target")), err)
	}
	if o := open("/dev/full"); o != nil {
		if err := o.begin(); err != nil {
			t.Fatal(err)
		}
		o.buf = append(o.buf, 'x')
		if err := o.close(); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "write to /dev/full: no space left") {
			t.Errorf("close: %v", err)
		}
	}
}

// A closed standard output is /dev/null, by Go's runtime, and one that cannot be written is an error at once.
func TestOutputNowhere(t *testing.T) {
	for _, tt := range []struct {
		path    string
		mode    int
		output  string
		nowhere bool
		err     string
	}{
		{os.DevNull, os.O_RDWR, "", true, ""},
		{os.DevNull, os.O_RDWR, filepath.Join(t.TempDir(), "out"), false, ""},
		{os.DevNull, os.O_WRONLY, "", false, ""},
		{"/dev/zero", os.O_RDWR, "", false, ""},
		{os.DevNull, os.O_RDONLY, "", false, "standard output is open for reading only"},
		{os.DevNull, os.O_RDONLY, filepath.Join(t.TempDir(), "out"), false, ""},
	} {
		f, err := os.OpenFile(tt.path, tt.mode, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		switch o, err := openOutput(&config{output: tt.output}, f); {
		case err != nil:
			if tt.err == "" || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%+v: %v", tt, err)
			}
		case tt.err != "" || o.nowhere != tt.nowhere:
			t.Errorf("%+v: nowhere %v", tt, o.nowhere)
		}
	}
}

// Where the reader stands still, nftrace waits for it until it is to end at once. What is in the pipe then are
// whole packets, and what is not is counted.
func TestOutputEndsNow(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	o, err := openOutput(&config{}, w)
	if err != nil {
		t.Fatal(err)
	}
	now := make(chan struct{})
	o.now = now
	const packet, packets = 1307, 100 // more than a pipe holds
	for range packets {
		o.buf = append(append(o.buf, bytes.Repeat([]byte("x"), packet-1)...), '\n')
		o.ends = append(o.ends, len(o.buf))
	}
	ended := make(chan error)
	go func() { ended <- o.flush() }()
	select {
	case err := <-ended:
		t.Fatalf("it does not wait for the reader: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(now)
	select {
	case err := <-ended:
		if !errors.Is(err, errNow) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it waits for the reader")
	}
	n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 || n%packet != 0 || uint64(n/packet)+o.unwritten != packets {
		t.Errorf("%d bytes are in the pipe, and %d packets are not", n, o.unwritten)
	}
}

// The reader of a pipe is missed without a write.
func TestOutputGone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	o, err := openOutput(&config{}, w)
	if err != nil {
		t.Fatal(err)
	}
	if o.gone() {
		t.Error("gone, but the reader is there")
	}
	r.Close()
	for range 2 { // asking changes nothing
		if !o.gone() {
			t.Error("not gone, but nobody reads")
		}
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if o, err = openOutput(&config{}, f); err != nil || o.gone() {
		t.Errorf("a file: gone %v, %v", o.gone(), err)
	}
}

type thousand struct{}

func (thousand) Append(b []byte, _ *events.Journey) []byte {
	return append(append(b, bytes.Repeat([]byte{'x'}, 999)...), '\n')
}

type writes []int

func (w *writes) Write(b []byte) (int, error) {
	*w = append(*w, len(b))
	return len(b), nil
}

// Packets are written many at once, and none in two pieces.
func TestOutputWhole(t *testing.T) {
	var w writes
	o, err := openOutput(&config{}, &w)
	if err != nil {
		t.Fatal(err)
	}
	o.Renderer = thousand{}
	for range 300 {
		if err := o.journey(nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second has nothing to write
		if err := o.flush(); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(w, writes{263_000, 37_000}) {
		t.Errorf("got %v", w)
	}
}

// A packet that met no rule has no line of the trace format, and is nothing to write.
func TestOutputNothing(t *testing.T) {
	o, err := openOutput(&config{output: filepath.Join(t.TempDir(), "out")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o.Renderer = nothing{}
	for range 3 {
		if err := errors.Join(o.journey(nil), o.flush()); err != nil {
			t.Fatal(err)
		}
	}
	if len(o.ends) != 0 {
		t.Errorf("%d packets are remembered", len(o.ends))
	}
}

type nothing struct{}

func (nothing) Append(b []byte, _ *events.Journey) []byte { return b }

// Where the disk is full in the midst of a packet, those before it are in the file, and nothing else.
func TestOutputCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	o, err := openOutput(&config{output: path}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o.Renderer, o.w = thousand{}, &fullAfter{o.file, 5_500}
	for range 3 {
		if err = errors.Join(o.journey(nil), o.journey(nil), o.journey(nil), o.flush()); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 5_000 {
		t.Errorf("%d bytes, want 5 packets; %v", st.Size(), err)
	}
	if o.unwritten != 1 {
		t.Errorf("%d packets are not written, want 1 of the 6", o.unwritten)
	}
}

// fullAfter has room for so many bytes.
type fullAfter struct {
	f    *os.File
	room int
}

func (w *fullAfter) Write(b []byte) (int, error) {
	if len(b) <= w.room {
		w.room -= len(b)
		return w.f.Write(b)
	}
	n, err := w.f.Write(b[:w.room])
	return n, errors.Join(err, unix.ENOSPC)
}

// A ready-file of an earlier run must not say that this one is attached, and nothing else is removed.
func TestClearReadyFile(t *testing.T) {
	tmp := t.TempDir()
	path := func(name string) string { return filepath.Join(tmp, name) }
	if err := errors.Join(os.WriteFile(path("left"), nil, 0o644), os.WriteFile(path("other"), []byte("x"), 0o644),
		unix.Mkfifo(path("fifo"), 0o600), os.Mkdir(path("dir"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		err  string
		is   bool // there afterwards
	}{
		{"left", "", false},
		{"new", "", false},
		{"other", path("other") + " is there already", true},
		{"fifo", "", true},
		{"none/x", "the directory " + path("none") + " does not exist", false},
		{"other/x", path("other") + " is not a directory", false},
		{"dir", path("dir") + " is a directory: name a file in it", true},
		{strings.Repeat("x", 300), "file name too long", false},
	} {
		err := clearReadyFile(path(tt.name))
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.err)
		}
		if _, err := os.Lstat(path(tt.name)); (err == nil) != tt.is {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestEndingSignals(t *testing.T) {
	for _, sig := range []os.Signal{unix.SIGHUP, unix.SIGQUIT} {
		before := len(endingSignals())
		if !slices.Contains(endingSignals(), sig) {
			t.Errorf("%v does not end it", sig)
		}
		signal.Ignore(sig)
		if all := endingSignals(); slices.Contains(all, sig) || len(all) != before-1 {
			t.Errorf("where %v is ignored: %v", sig, all)
		}
		signal.Reset(sig)
	}
}
