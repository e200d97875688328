#!/usr/bin/perl
# The text of Jane Austen's six novels from Debian's package r-cran-janeaustenr (public domain), without R.
#
#   austen_corpus.pl Rdata.rdb chapters.jsonl text.txt
#
# Rdata.rdb is a row of records, each (u32 big-endian length unpacked, zlib stream) of one serialised R object: "X\n",
# three i32 versions, in version 3 the encoding (i32 length, name), then for a vector of strings i32 flags (low byte
# 16), i32 count, and each string as i32 flags (low byte 9), i32 length, bytes. A string here is a line of a novel.
#
# chapters.jsonl gets one {"text": ...} a chapter, a paragraph a line; text.txt the same text plainly.
use strict;
use warnings;
use Compress::Zlib;

die "usage: austen_corpus.pl Rdata.rdb chapters.jsonl text.txt\n" unless @ARGV == 3;
my ($rdb_path, $jsonl_path, $text_path) = @ARGV;

# The lines of a serialised vector of strings; nothing for any other R object.
sub lines_of_object {
    my ($bytes) = @_;
    return () unless substr($bytes, 0, 2) eq "X\n";
    my $at = 14;
    my $next_int = sub { my $value = unpack('N', substr($bytes, $at, 4)); $at += 4; return $value; };
    $at += $next_int->() if unpack('N', substr($bytes, 2, 4)) == 3;
    return () unless ($next_int->() & 255) == 16;
    my @lines;
    for (1 .. $next_int->()) {
        die "$rdb_path: not a string at byte $at\n" unless ($next_int->() & 255) == 9;
        my $length = $next_int->();
        next if $length == 0xffffffff;    # R's missing value
        push @lines, substr($bytes, $at, $length);
        $at += $length;
    }
    return @lines;
}

# Joins the lines of each paragraph; starts a chapter at each heading. Returns chapters of paragraphs.
sub chapters_of_lines {
    my (@chapters, @paragraph);
    my $end_paragraph = sub {
        push @{ $chapters[-1] }, join(' ', @paragraph) if @paragraph;
        @paragraph = ();
    };
    push @chapters, [];
    for (@_, '') {
        my $line = s/^\s+|\s+$//gr;
        if ($line eq '') {
            $end_paragraph->();
        } elsif ($line =~ /^chapter\s+\S+$/i) {
            $end_paragraph->();
            push @chapters, [];
        } else {
            push @paragraph, $line;
        }
    }
    return grep { @$_ > 0 } @chapters;
}

sub json_string {
    my ($text) = @_;
    $text =~ s/(["\\])/\\$1/g;
    $text =~ s/\n/\\n/g;
    $text =~ s/([\x00-\x1f])/sprintf('\\u%04x', ord($1))/ge;
    return "\"$text\"";
}

# The whole file, then each zlib stream: inflate leaves the bytes after it in $rest.
open(my $rdb, '<:raw', $rdb_path) or die "$rdb_path: $!\n";
my $rest = do { local $/; <$rdb> };
my @novels;
while (length($rest) > 4) {
    substr($rest, 0, 4, '');
    my ($stream, $status) = inflateInit();
    (my $object, $status) = $stream->inflate($rest);
    die "$rdb_path: damaged zlib stream\n" unless $status == Z_STREAM_END;
    my @lines = lines_of_object($object);
    push @novels, \@lines if @lines;
}
die "$rdb_path: no text found\n" unless @novels;

open(my $jsonl, '>:raw', $jsonl_path) or die "$jsonl_path: $!\n";
open(my $text, '>:raw', $text_path) or die "$text_path: $!\n";
my $num_chapters = 0;
for my $novel (@novels) {
    for my $chapter (chapters_of_lines(@$novel)) {
        my $chapter_text = join("\n", @$chapter) . "\n";
        print $jsonl '{"text": ', json_string($chapter_text), "}\n";
        print $text $chapter_text;
        $num_chapters++;
    }
}
close($jsonl) or die "$jsonl_path: $!\n";
close($text) or die "$text_path: $!\n";
printf "%d novels, %d chapters, %.1f MB of text\n", scalar(@novels), $num_chapters, (-s $text_path) / 1e6;
