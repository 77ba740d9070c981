package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A suite of Debian's archive.
type suite struct {
	name     string
	security bool // in the security archive
	// ended says that Debian no longer renews the suite's index: its signature is checked
	// like any other's, but not the date up to which it was to be valid.
	ended bool
}

// apt is the options with which apt's programs are called; nil asks the machine's own index.
type apt []string

// aptRefresh is how old the index of a suite may get.
const aptRefresh = 24 * time.Hour

// debianKeyring is what Debian signs its suites with (package debian-archive-keyring).
const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// suitesApt returns the options to ask for an architecture's packages of suites that the
// machine's apt sources need not have. Index and state are below dir and nowhere else; the machine's apt lends
// the archive's address and what it says of proxies. Where the archive cannot be reached,
// an index fetched before is used and log is told so.
func suitesApt(ctx context.Context, dir, arch string, suites []suite, log io.Writer) (apt, error) {
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return nil, err
	}

	targets, err := output(ctx, "", "apt-get", "indextargets", "--format", targetFormat, "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	keyring := debianKeyring
	if _, err := os.Stat(keyring); err != nil {
		keyring = "" // apt then checks with all keys that the machine trusts
	}
	sources, err := suiteSources(arch, suites, targets, keyring)
	if err != nil {
		return nil, err
	}
	list := filepath.Join(dir, "sources.list")
	old, _ := os.ReadFile(list)
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "apt.conf")
	if err := os.WriteFile(conf, []byte(aptConf(dir, arch, list)), 0o644); err != nil {
		return nil, err
	}
	opts := apt{"-c", conf}

	stamp := filepath.Join(dir, "updated")
	if st, err := os.Stat(stamp); err == nil && string(old) == sources && time.Since(st.ModTime()) < aptRefresh {
		return opts, nil
	}
	var names []string
	for _, s := range suites {
		names = append(names, s.name)
	}
	fmt.Fprintf(log, "vm: fetching the package index of %s\n", strings.Join(names, ", "))
	if _, err := opts.run(ctx, "", "apt-get", "-q", "update"); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		fmt.Fprintf(log, "vm: using what is there of the package index of %s: %v\n", strings.Join(names, ", "), err)
		return opts, nil
	}
	return opts, os.WriteFile(stamp, nil, 0o644)
}

// aptConf is read behind the machine's own configuration and keeps apt from all that is
// the machine's: architecture, sources, preferences, index, caches, and what is run after
// an update.
func aptConf(dir, arch, list string) string {
	return fmt.Sprintf(`#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture %[3]q;
APT::Architectures %[3]q;
Dir::Etc::sourcelist %[2]q;
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
Dir::State %[1]q;
Dir::State::lists "lists/";
Dir::State::status "/dev/null";
Dir::Cache "%[1]s/cache";
Dir::Cache::archives "archives/";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Update::Error-Mode "any"; // an index that was not fetched is an error, not a warning
Acquire::Retries "0";
Acquire::http::Timeout "20";
`, dir, list, arch)
}

// run is output with the options; for root, without apt's user for downloads.
func (a apt) run(ctx context.Context, dir, program string, args ...string) (string, error) {
	if os.Geteuid() == 0 {
		// apt's own user need not be able to write to root's cache.
		args = append([]string{"-o", "APT::Sandbox::User=root"}, args...)
	}
	return output(ctx, dir, program, append(append([]string{}, a...), args...)...)
}

// cure ends an error about a package that is not to be had.
func (a apt) cure() string {
	if a == nil {
		return "run apt-get update, or add the suite that has it to apt's sources"
	}
	return "check that the archive of the machine's apt sources can be reached and has the suite"
}

// targetFormat is what suiteSources reads: for each index of the machine's apt its archive and,
// once it has been fetched, what the archive calls itself.
const targetFormat = "$(REPO_URI)|$(ORIGIN)|$(LABEL)"

// archiveOf returns the address of Debian's archive, or of its security archive, among the
// machine's apt sources; "" if there is none.
func archiveOf(targets string, security bool) string {
	label, base := "Debian", "debian"
	if security {
		label, base = "Debian-Security", "debian-security"
	}
	guess := ""
	for line := range strings.SplitSeq(targets, "\n") {
		f := strings.Split(line, "|")
		if len(f) != 3 || strings.HasPrefix(f[0], "cdrom:") {
			continue
		}
		if f[1] == "Debian" && f[2] == label {
			return f[0]
		}
		// Its index has not been fetched yet.
		if f[1] == "" && guess == "" && path.Base(f[0]) == base {
			guess = f[0]
		}
	}
	return guess
}

// suiteSources is a sources.list for an architecture's packages of the suites, at the archive that the machine's own apt
// uses. A suite whose archive is not known is left out; it is an error if that leaves none.
func suiteSources(arch string, suites []suite, targets, keyring string) (string, error) {
	var b strings.Builder
	for _, s := range suites {
		uri := archiveOf(targets, s.security)
		if uri == "" {
			continue
		}
		options := "arch=" + arch + " target=Packages lang=none"
		if keyring != "" {
			options += " signed-by=" + keyring
		}
		if s.ended {
			options += " check-valid-until=no"
		}
		fmt.Fprintf(&b, "deb [%s] %s %s main\n", options, uri, s.name)
	}
	if b.Len() == 0 {
		return "", errors.New("the machine's apt sources do not tell where Debian's archive is: add a suite of Debian's to them")
	}
	return b.String(), nil
}
